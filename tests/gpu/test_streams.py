"""Callers with CUDA streams and threads of their own share one compiled model."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.support.on_gpu import OnGpu, on_gpu


def generated(bank: OnGpu, ids: torch.Tensor, stream: Any) -> list[int]:
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        out: list[int] = bank.compiled.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
        return out


def test_requests_in_threads_on_streams_of_their_own() -> None:
    """Recordings share memory, and buffers go from one request to the next."""
    bank = on_gpu()
    prompts = [bank.tokens(1, 5 + i % 3) for i in range(12)]
    with bank.using():
        want = [generated(bank, ids, torch.cuda.default_stream()) for ids in prompts]
        for _ in range(3):
            streams = [torch.cuda.Stream() for _ in prompts]
            with ThreadPoolExecutor(4) as pool:
                got = list(
                    pool.map(
                        lambda pair: generated(bank, *pair), zip(prompts, streams, strict=True)
                    )
                )
            assert got == want


def test_requests_in_turn_on_two_streams() -> None:
    bank = on_gpu()
    ids = bank.tokens(1, 6)
    with bank.using():
        want = generated(bank, ids, torch.cuda.default_stream())
        for stream in [torch.cuda.Stream(), torch.cuda.Stream()] * 4:
            assert generated(bank, ids, stream) == want


def test_graphs_are_captured_on_a_stream_that_callers_never_get() -> None:
    """What is launched on a stream in the middle of a capture would be captured, not run."""
    bank = on_gpu()
    with bank.using():
        generated(bank, bank.tokens(1, 5), torch.cuda.default_stream())
        recorder = bank.runtime.runner.static._recorder
        assert recorder is not None
        theirs = {torch.cuda.Stream().cuda_stream for _ in range(64)}
        assert len(theirs) < 64  # they have some twice
        assert recorder._stream.cuda_stream not in theirs


def test_what_a_step_reads_is_not_given_away_while_its_stream_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step that runs ahead of the host may read its inputs after the request is gone."""
    # (memory that grows in place waits for the device when it is freed)
    monkeypatch.setattr("adaskip_fx.kv_cache.growing_memory.is_available", lambda device: False)
    bank = on_gpu()
    ids, other = bank.tokens(1, 6), torch.cuda.Stream()
    with bank.using():
        with torch.cuda.stream(other):  # compiled now, not while the device is kept busy
            bank.compiled(ids[:, :1], past_key_values=bank.compiled(ids).past_key_values)
        torch.cuda.synchronize()
        generated(bank, ids, torch.cuda.default_stream())  # its buffers are the next request's
        pool = bank.runtime.buffer_pool
        (step,) = pool.idle[-1].steps.values()
        mine = {t.data_ptr() for t in step.inputs.all()}
        assert len(mine) == len(step.inputs.all())
        with torch.cuda.stream(other):
            other.wait_stream(torch.cuda.default_stream())
            cache = bank.compiled(ids).past_key_values
            torch.cuda._sleep(2**34)
            bank.compiled(ids[:, :1], past_key_values=cache)
        gone = weakref.ref(step)
        del step, cache
        pool.clear()
        gc.collect()
        assert gone() is None
        new = [torch.zeros(1, 1, dtype=torch.int64, device="cuda") for _ in range(4096)]
        assert not other.query()
        assert mine.isdisjoint(t.data_ptr() for t in new)
