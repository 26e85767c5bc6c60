"""A kernel with its arguments: run it, or compile it for arguments like these."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, and the tensors that it writes.

    Attributes:
        kernel: A Triton kernel.
        grid: How many programs run, by axis.
        arguments: Of the kernel, in order.
        flags: Its constants and launch options, by name.
        outputs: Those of the arguments that are the results.
        wants_l1: Whether it reads through the L1 cache, which a kernel that ran before, with much
            shared memory, would leave small: both are one memory of a multiprocessor.

    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    flags: dict[str, Any]
    outputs: list[torch.Tensor]
    wants_l1: bool = False

    def run(self) -> list[torch.Tensor]:
        """Launch the kernel; returns its outputs."""
        compiled = self.kernel[self.grid](*self.arguments, **self.flags)
        if self.wants_l1 and compiled is not None:  # (Triton's interpreter compiles nothing)
            _prefer_l1(compiled.function)
        return self.outputs

    def compile(self, device: torch.device) -> None:
        """Compile for arguments like these, which may be fake; the next `run` finds the kernel.

        Args:
            device: The CUDA device that it will run on.

        """
        mocked = [_mock(a) for a in self.arguments]
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(*mocked, grid=self.grid, **self.flags)
            _ = compiled.run  # loads it, and builds its launcher
            if self.wants_l1:
                _prefer_l1(compiled.function)


def _mock(value: Any) -> Any:
    """Return what stands for an argument: a dtype for an aligned tensor, a number for a length."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value.node.hint if isinstance(value, torch.SymInt) else value


@functools.cache
def _prefer_l1(function: int) -> None:
    """Have the driver give a kernel all of L1 that it can; a hint, which nothing depends on."""
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError:  # (torch's CUDA builds install it)
        return
    carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    driver.cuFuncSetAttribute(driver.CUfunction(function), carveout, 0)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have on a device."""
    if device.type != "cuda":
        return 227 * 1024  # of compute capability 9, for which sizes were chosen
    properties: Any = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin
    return limit


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Return whether the device knows programmatic dependent launch (compute capability 9)."""
    return torch.cuda.get_device_capability(device)[0] >= 9


@functools.lru_cache(maxsize=4096)
def on_device(
    numbers: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Return indices on a device; to copy them there at every call would make the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
