"""Callers with CUDA streams and threads of their own share one compiled model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
