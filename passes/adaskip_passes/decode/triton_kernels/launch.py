"""A kernel with its arguments: run it, or compile it for arguments like these."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, and the tensors that it writes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    flags: dict[str, Any]
    outputs: list[torch.Tensor]

    def run(self) -> list[torch.Tensor]:
        self.kernel[self.grid](*self.arguments, **self.flags)
        return self.outputs

    def compile(self, device: torch.device) -> None:
        """Compile for arguments like these, which may be fake; the next `run` finds it."""
        mocked = [_mock(a) for a in self.arguments]
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(*mocked, grid=self.grid, **self.flags)
            _ = compiled.run  # loads it, and builds its launcher


def _mock(value: Any) -> Any:
    """A dtype stands for an aligned tensor, an example for a length."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value.node.hint if isinstance(value, torch.SymInt) else value


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (compute capability 9)."""
    return torch.cuda.get_device_capability(device)[0] >= 9
