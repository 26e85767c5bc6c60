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


def copy_rate(device: torch.device) -> float:
    """Bytes read and written in a second by a large copy: of 4 GiB on a GPU, smaller on a CPU."""
    size = 4 * 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = statistics.median(seconds(lambda: target.copy_(source), device, repeats=10))
    return 2 * size / took


class MatrixRate:
    """Operations a second in products of two random matrices, 8192 x 8192 on a GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        on_gpu = device.type == "cuda"
        self.device = device
        self.width = 8192 if on_gpu else 512
        self._together = 150 if on_gpu else 3
        size = self.width, self.width
        self._a, self._b = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def sustained(self) -> float:
        """Back to back for a fifth of a second: under such a load a GPU lowers its clock."""

        def products() -> None:
            for _ in range(self._together):
                self._product()

        (took,) = seconds(products, self.device, repeats=1, warmup=0)
        return 2 * self.width**3 * self._together / took

    def burst(self) -> float:
        """With a pause after each: the median of 20."""
        return 2 * self.width**3 / statistics.median(seconds(self._product, self.device, 20, 5))

    def _product(self) -> None:
        torch.mm(self._a, self._b, out=self._out)
