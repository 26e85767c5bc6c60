"""transformers' functions that have a torch form and, where a library is installed, a kernel."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelFunction:
    """Such a function.

    Attributes:
        written: what it is in torch.
        has_kernel: whether a kernel of another library is called instead.
    """

    written: Callable[..., Any]
    has_kernel: bool


def kernel_or_torch(value: object) -> KernelFunction | None:
    """Return what a function of transformers' has been made of; None if it is no such function.

    (``use_kernel_func_from_hub_with_fallback`` wraps them, and keeps in the closure what is
    called.)
    """
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return None
    held = dict(zip(value.__code__.co_freevars, value.__closure__, strict=True))
    if "torch_function" not in held or "implementation" not in held:
        return None
    written = held["torch_function"].cell_contents
    return KernelFunction(written, held["implementation"].cell_contents is not written)
