"""Recordings and buffers stay within the memory budget, by what the driver says of the device."""

from __future__ import annotations

import gc
import random

import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from tests.support.compiled_llamas import check_request
from tests.support.on_gpu import OnGpu, on_gpu

#: What else of this process may come and go on the device: code of kernels, handles of libraries.
NOISE = 64 * 2**20


def taken() -> int:
    """Bytes of the device that are in use, but not by PyTorch's allocator."""
    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def scaled(bank: OnGpu, number: int) -> SkipPlan:
    """One of many plans that store the same and run the same pieces."""
    return bank.plan([], ["0.ffn"], {"0.ffn": 0.5 + number / 64})


def request(bank: OnGpu, number: int, batch: int = 1, length: int = 5) -> None:
    plan = scaled(bank, number)
    with bank.using(plan):
        check_request(bank, plan, (length, 1, 1), batch=batch, keep=1)


def test_whatever_comes_stays_within_the_budget() -> None:
    bank, draw = on_gpu(), random.Random(0)
    request(bank, 0, 1), request(bank, 0, 2)
    stats = bank.compiled.adaskip.stats()
    for _ in range(24):
        beside = draw.randrange(2**25)
        bank.compiled.adaskip.memory_budget = stats.graph_bytes + stats.program_bytes + beside
        request(bank, draw.randrange(8), draw.choice([1, 2]), draw.randrange(2, 500))
        gc.collect()
        now = bank.compiled.adaskip.stats()
        kept = now.graph_bytes + now.program_bytes + now.recording_bytes + now.idle_bytes
        alone = now.recordings <= 1 and not now.idle_bytes
        assert alone or kept <= bank.compiled.adaskip.memory_budget
        assert now.recordings == sum(  # a name for those buffers would hold some that are let go
            len(step._recordings)
            for buffers in bank.runtime.buffer_pool.idle
            for step in buffers.steps.values()
        )


def test_what_is_counted_is_what_the_driver_took() -> None:
    """Of many recordings and buffers together; and it is there again when they are let go."""
    bank = on_gpu()
    for batch in (1, 2):
        request(bank, 0, batch)
    bank.compiled.adaskip.free()
    before = taken()
    for number in range(1, 33):
        request(bank, number)
    request(bank, 0, 2)
    gc.collect()
    stats, more = bank.compiled.adaskip.stats(), taken() - before
    assert stats.recordings >= 33
    counted = stats.recording_bytes + stats.idle_bytes
    assert abs(more - counted) < NOISE, f"{more} bytes taken, {counted} counted"
    bank.compiled.adaskip.memory_budget = stats.graph_bytes + stats.program_bytes
    assert bank.compiled.adaskip.stats().idle_bytes == 0
    assert taken() - before < NOISE


def test_memory_is_flat_from_the_tenth_request_on() -> None:
    bank, draw, levels = on_gpu(), random.Random(1), list[int]()
    for _ in range(32):
        request(bank, draw.randrange(3), 1, draw.randrange(2, 550))
        levels.append(taken())
    assert max(levels[10:]) - levels[9] < NOISE
