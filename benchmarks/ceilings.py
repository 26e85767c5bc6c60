"""What the device can do, measured: bytes it copies and products it multiplies in a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    run: Callable[[], Any], device: torch.device, repeats: int = 5, warmup: int = 2
) -> list[float]:
    """Wall-clock seconds of each of `repeats` runs, with a synchronisation after each."""
    for _ in range(warmup):
        run()
    synchronize(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and matrix rate (operations a second).

    On a GPU: a copy of 4 GiB and a product of two random 8192 x 8192 matrices; on a CPU smaller.
    Products are timed back to back for as long as a prompt takes (a fifth of a second and more),
    because a GPU lowers its clock under such a load; `burst` is the rate with a pause after each,
    measured last.
    """
    on_gpu = device.type == "cuda"
    size = 4 * 2**30 if on_gpu else 2**26
    copy = _copy_seconds(size, device)
    width = 8192 if on_gpu else 512
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    together = 150 if on_gpu else 3

    def products() -> None:
        for _ in range(together):
            torch.mm(a, b, out=out)

    product = statistics.median(seconds(products, device, repeats=5)) / together
    burst = statistics.median(seconds(lambda: torch.mm(a, b, out=out), device, 20, 5))
    return {
        "copy_bytes_per_s": 2 * size / copy,
        "matrix_flop_per_s": 2 * width**3 / product,
        "matrix_flop_per_s_burst": 2 * width**3 / burst,
    }


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return statistics.median(seconds(lambda: target.copy_(source), device, repeats=10))
