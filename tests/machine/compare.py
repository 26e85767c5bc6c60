"""What a call gave, and how that differs from what another gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_CACHE = "a cache"
CACHES = ("cache", "cache_params", "past_key_values")
#: Relative errors that other kernels may cause, in units of the largest expected value.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Outcome:
    """What a call gave or raised."""

    value: Any = None
    error: Exception | None = None

    @classmethod
    def of(cls, call: Callable[[], Any]) -> Outcome:
        try:
            return cls(value=call())
        except Exception as error:
            return cls(error=error)

    def __str__(self) -> str:
        if self.error is None:
            return "a value"
        return f"{type(self.error).__name__}: {' '.join(str(self.error).split())[:400]}"


def cache_of(output: Any) -> Any:
    """The cache in an output of a model, a dictionary or a tuple; None if there is none."""
    if isinstance(output, tuple):
        return next((x for x in output if hasattr(x, "get_seq_length")), None)
    return next((output[n] for n in CACHES if n in output and output[n] is not None), None)


def difference(got: Any, want: Any, tolerance: float, *, caches: bool = True) -> str:
    """How an output differs from the one that it should be; empty if it does not.

    `caches`: whether both must hand out a cache, or neither.
    """
    if isinstance(want, tuple) != isinstance(got, tuple):
        return f"a {type(got).__name__} instead of a {type(want).__name__}"
    mine, theirs = _parts(got), _parts(want)
    if not caches:
        for parts in (mine, theirs):
            parts.pop(_CACHE, None)
    if list(mine) != list(theirs):
        return f"it has {', '.join(mine)} instead of {', '.join(theirs)}"
    return next((d for name in theirs if (d := _part(name, mine, theirs, tolerance))), "")


def _parts(output: Any) -> dict[str, Any]:
    """What is in an output: of a cache only that there is one."""
    if isinstance(output, torch.Tensor):
        return {"tokens": output}
    if isinstance(output, Mapping):
        named = {n: v for n, v in output.items() if n not in CACHES and v is not None}
    else:
        named = {f"[{i}]": v for i, v in enumerate(output) if not hasattr(v, "get_seq_length")}
    return {**named, **({_CACHE: True} if cache_of(output) is not None else {})}


def _part(name: str, mine: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> str:
    got, want = mine[name], theirs[name]
    if isinstance(want, tuple | list):
        if len(got) != len(want):
            return f"{name}: {len(got)} of them instead of {len(want)}"
        pairs = enumerate(zip(got, want, strict=True))
        found = (_tensor(f"{name}[{i}]", a, b, tolerance) for i, (a, b) in pairs)
        return next((d for d in found if d), "")
    if isinstance(want, torch.Tensor):
        return _tensor(name, got, want, tolerance)
    return "" if got == want else f"{name}: {got!r} instead of {want!r}"


def _tensor(name: str, got: Any, want: torch.Tensor, tolerance: float) -> str:
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return f"{name}: {list(getattr(got, 'shape', []))} instead of {list(want.shape)}"
    if got.dtype != want.dtype:
        return f"{name}: {got.dtype} instead of {want.dtype}"
    if not want.is_floating_point():
        return (
            "" if torch.equal(got, want) else f"{name}: {got.tolist()} instead of {want.tolist()}"
        )
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return f"{name}: not finite elsewhere"
    one, other = got[finite].double(), want[finite].double()
    if not other.numel():
        return ""
    error = float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
    return "" if error <= tolerance else f"{name}: relative error {error:.1e}"
