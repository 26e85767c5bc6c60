"""Sums over ranks in one kernel: ranks are streams of one GPU here, beside sums in float64."""

from __future__ import annotations

import pytest
import torch

from adaskip_passes.decode import shared_memory
from adaskip_passes.decode.rank_sums import MOST_NUMBERS
from adaskip_passes.decode.shared_memory import PROGRAMS, Shared

triton_kernels = pytest.importorskip("adaskip_passes.decode.triton_kernels")


def ranks(count: int) -> list[Shared]:
    device = torch.device("cuda")
    held = [
        torch.zeros(Shared.nbytes(count), dtype=torch.uint8, device=device) for _ in range(count)
    ]
    addresses = torch.tensor([memory.data_ptr() for memory in held], device=device)
    return [
        Shared(
            rank,
            addresses,
            torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32).pin_memory(),
            held=held,
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_get_the_same_sum_in_every_turn(count: int, dtype: torch.dtype) -> None:
    shared = ranks(count)
    streams = [torch.cuda.Stream() for _ in shared]
    for numbers in (4096, 5, 8192, MOST_NUMBERS // 2, 4096, 1025):
        parts = [torch.randn(numbers, device="cuda", dtype=dtype) for _ in shared]
        residual = torch.randn(numbers, device="cuda", dtype=dtype)
        given = residual if numbers % 2 else None
        torch.cuda.synchronize()
        launches = [
            triton_kernels.rank_sum(x, given, s) for x, s in zip(parts, shared, strict=True)
        ]
        for launch in launches:  # what is compiled at a launch must not wait for another rank
            launch.compile(torch.device("cuda"))
        for launch, stream in zip(launches, streams, strict=True):
            with torch.cuda.stream(stream):
                launch.run()
        torch.cuda.synchronize()
        expected = sum(part.double() for part in parts)
        expected = expected + residual.double() if given is not None else expected
        found = [launch.outputs[0] for launch in launches]
        assert all(torch.equal(found[0], other) for other in found)
        tolerance = 2**-8 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=tolerance)


def test_who_is_told_to_stop_does_not_wait_for_a_rank_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, _ = ranks(2)
    monkeypatch.setitem(shared_memory._of_groups, "gone", alone)
    launch = triton_kernels.rank_sum(torch.ones(4096, device="cuda"), None, alone)
    launch.compile(torch.device("cuda"))
    launch.run()
    ended = torch.cuda.Event()
    ended.record()
    assert not ended.query()
    shared_memory.stop_waiting("gone")
    ended.synchronize()
    assert torch.equal(launch.outputs[0], torch.ones(4096, device="cuda"))
