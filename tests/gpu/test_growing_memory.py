"""Buffers of a GPU that grow where they are."""

from __future__ import annotations

import gc

import pytest
import torch

from adaskip_fx.kv_cache import growing_memory, mapped_memory
from adaskip_fx.kv_cache.buffer_pool import BufferPool
from adaskip_fx.kv_cache.growing_memory import GrowingMemory
from adaskip_fx.kv_cache.layer_spec import LayerCacheSpec
from tests.support.on_gpu import on_gpu

MIB = 2**20
DEVICE = torch.device("cuda", 0)


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(DEVICE)[0]


def test_content_and_address_stay() -> None:
    assert growing_memory.is_available(DEVICE)
    memory = GrowingMemory(DEVICE, [64 * MIB, 3 * MIB])
    memory.fit([MIB, MIB])
    first, second = memory.tensor(0), memory.tensor(1)
    first[:MIB], second[:MIB] = 7, 9
    before = first.data_ptr()
    memory.fit([33 * MIB, MIB])
    first[MIB : 33 * MIB] = 3
    assert first.data_ptr() == before == memory.address(0)
    assert memory.filled[0] >= 33 * MIB > memory.filled[1]
    assert bool((first[:MIB] == 7).all())
    assert bool((second[:MIB] == 9).all())
    assert int(first[:MIB].sum()) == 7 * MIB
    assert bool((first[MIB : 33 * MIB] == 3).all())


def test_memory_comes_back() -> None:
    torch.zeros(1, device=DEVICE)
    mapped_memory.collect()
    before = free_bytes()
    memory = GrowingMemory(DEVICE, [2**36])
    assert free_bytes() == before, "addresses cost nothing"
    memory.fit([256 * MIB])
    view = memory.tensor(0)[:MIB]
    assert free_bytes() <= before - 256 * MIB
    del memory
    gc.collect()
    view.fill_(1)  # somebody may still look at it
    assert free_bytes() <= before - 256 * MIB
    del view
    gc.collect()
    assert free_bytes() == before


def test_nothing_is_unmapped_while_a_graph_is_captured() -> None:
    mapped_memory.collect()
    memory = GrowingMemory(DEVICE, [64 * MIB])
    memory.fit([64 * MIB])
    x, graph = torch.zeros(8, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        del memory
        gc.collect()
    graph.replay()
    assert x.tolist() == [1] * 8
    assert len(mapped_memory._retired) == 1
    mapped_memory.collect()
    assert len(mapped_memory._retired) == 0


def test_no_memory_is_an_error_of_torch() -> None:
    memory = GrowingMemory(DEVICE, [2**42])
    with pytest.raises(torch.OutOfMemoryError, match="no room for more keys and values"):
        memory.fit([2**41])


def test_kept_buffers_serve_any_length() -> None:
    pool = BufferPool(keep=True, longest=100_000)
    specs = (LayerCacheSpec(8, 128, 8, 128),) * 2

    def acquire(tokens: int) -> object:
        return pool.acquire(specs, 1, tokens, torch.bfloat16, DEVICE)

    first = acquire(9000)
    for tokens in (1000, 30_000, 90_000, 5):
        pool.release(first)  # type: ignore[arg-type]
        again = pool.acquire(specs, 1, tokens, torch.bfloat16, DEVICE)
        assert again is first
        assert again.capacity >= tokens
        assert again.nbytes <= 2 * (2 * 2 * 2048 * tokens + 4 * 2 * MIB), "blocks of 2 MiB"
        keys = again.keys[0]
        assert keys is not None
        keys[:, :, :tokens] = 1.0


def test_it_grows_ahead_a_little_at_a_time() -> None:
    specs = (LayerCacheSpec(8, 128, 8, 128),) * 10
    pool = BufferPool(keep=False, longest=100_000)
    buffers = pool.acquire(specs, 1, 1024, torch.bfloat16, DEVICE)
    before, held = buffers.capacity, [buffers.nbytes]
    while buffers.capacity == before:
        buffers.grow_ahead(3000)
        held.append(buffers.nbytes)
    assert len(held) == 4, "20 ranges, 8 at a time"
    assert held == sorted(held)
    assert buffers.capacity >= 3000


def test_a_request_grows_under_its_recordings() -> None:
    bank = on_gpu()
    with bank.using(), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        steps = [bank.tokens(1, 5, 1)] + [bank.tokens(1, 1, i) for i in range(500)]
        address = None
        for i, ids in enumerate(steps):
            got = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            want = bank.model(ids, past_key_values=reference).logits[:, -1:]
            if i % 50 == 0:
                assert float((got - want).abs().max()) < bank.tolerance * float(want.abs().max())
            keys = cache.keys[0]
            assert keys is not None
            address = address or keys.data_ptr()
            assert keys.data_ptr() == address
    assert bank.recorded == 1
