"""Neighbouring stand-ins as one, where that is exact.

Where several sublayers in a row are skipped, their stand-ins are applied one after the other with
nothing in between, and the composition of two is often a stand-in again::

    x -> 0.9 x -> 0.9 x + (0.9 x) W^T + b        becomes        x -> x + x V^T + b

with `V = 0.9 (I + W) - I`. Exact as algebra, and computed in float64; what changes is rounding.
A multiple of a low-rank map has no such form and stays as it is, and so does a normalized map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from .skip_plan import Action, Phase, PlanError, SkipPlan
from .sublayer import Sublayer
from .surrogate import StandIn, StandInKind

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """One or more stand-ins, applied one after the other.

    kind, rank: of the one stand-in that they are together.
    parts: the stand-ins, in the order of the stream.
    """

    kind: StandInKind
    rank: int
    parts: tuple[StandIn, ...]

    @classmethod
    def of(cls, stand_in: StandIn) -> Fold:
        """A stand-in alone."""
        return cls(stand_in.kind, stand_in.rank, (stand_in,))

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the content."""
        return tuple(part.digest for part in self.parts)

    def then(self, stand_in: StandIn) -> Fold | None:
        """Both as one; None where they have no common form, or one that is no cheaper."""
        kinds = {self.kind, stand_in.kind}
        parts = (*self.parts, stand_in)
        if kinds == {"low_rank"}:
            rank = self.rank + stand_in.rank
            return Fold("low_rank", rank, parts) if rank < (stand_in.width or 0) else None
        if kinds <= {"scale", "diagonal"}:
            return Fold("scale" if kinds == {"scale"} else "diagonal", 0, parts)
        foldable = "linear" in kinds and "normalized" not in kinds
        return Fold("linear", 0, parts) if foldable else None

    def tensors(self, device: torch.device) -> Tensors:
        """The tensors of the one stand-in, float64 on `device`, by name."""
        first, *others = (_tensors(part, device) for part in self.parts)
        kind: StandInKind = self.parts[0].kind
        for part, tensors in zip(self.parts[1:], others, strict=True):
            first, kind = _composed(kind, first, part.kind, tensors)
        return first


def folds(plan: SkipPlan, phase: Phase, together: bool = True) -> dict[Sublayer, Fold]:
    """What is put in for each sublayer that does not run in a phase.

    Args:
        plan, phase: which.
        together: whether neighbours are folded. The last of them then has the fold, and the others
            are missing: they hand the stream on.
    """
    found: dict[Sublayer, Fold] = {}
    last: Sublayer | None = None  # what the next stand-in may be folded with
    for sublayer in plan.sublayers:
        action, stand_in = plan.action(phase, sublayer), plan.compensation.stand_in(sublayer)
        if action is not Action.SKIP or not together:
            last = None  # K/V are written from the stream as it is before the sublayer
        if action is Action.RUN or stand_in is None:
            continue
        fold = found[last].then(stand_in) if last is not None else None
        if fold is not None and last is not None:
            del found[last]
        found[sublayer] = fold or Fold.of(stand_in)
        last = sublayer
    return found


class SurrogateTensors:
    """Tensors of folds on a device, shared for as long as a program uses them."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[object, ...], _Set] = WeakValueDictionary()

    def get(self, sublayer: Sublayer, fold: Fold, like: Mapping[str, torch.Tensor]) -> _Set:
        """The tensors of a fold, each of the shape, dtype and device of the example in `like`.

        PlanError, naming `sublayer`, where a shape is another: the plan is of another model.
        """
        example = next(iter(like.values()))
        key = (*fold.key, example.device, *(t.dtype for t in like.values()))
        known = self._known.get(key)
        if known is None:
            made = fold.tensors(example.device)
            for name, tensor in like.items():
                if made[name].shape != tensor.shape:
                    raise PlanError(
                        f"{sublayer}: {name} of its {fold.kind} stand-in has shape "
                        f"{list(made[name].shape)}, but the model needs {list(tensor.shape)}; it "
                        "was fitted on another model"
                    )
            known = _Set({n: made[n].to(t.dtype).contiguous() for n, t in like.items()})
            self._known[key] = known
        return known


class _Set(dict[str, torch.Tensor]):
    """Tensors by name; a dictionary that can be referred to weakly."""

    __slots__ = ("__weakref__",)


def _tensors(stand_in: StandIn, device: torch.device) -> Tensors:
    return {
        name: torch.tensor(value, device=device).to(torch.float64)
        for name, value in stand_in.tensors.items()
    }


def _composed(
    kind: StandInKind, first: Tensors, second_kind: StandInKind, second: Tensors
) -> tuple[Tensors, StandInKind]:
    """`first`, then `second`, as one."""
    kinds = {kind, second_kind}
    if kinds == {"low_rank"}:
        return _low_rank(first, second), "low_rank"
    if kinds <= {"scale", "diagonal"}:
        factor = first["factor"] * second["factor"]
        return {"factor": factor}, "diagonal" if factor.dim() else "scale"
    hidden = next(t.shape[0] for t in (first.get("bias"), second.get("bias")) if t is not None)
    (before, start), (after, bias) = (_affine(t, hidden) for t in (first, second))
    weight = after @ before
    weight.diagonal().sub_(1)
    return {"weight": weight, "bias": after @ start + bias}, "linear"


def _affine(tensors: Tensors, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in as `x M^T + c`: M [H, H] and c [H]."""
    if "factor" in tensors:
        factor = tensors["factor"].expand(hidden)
        return torch.diag(factor), torch.zeros_like(factor)
    weight = tensors["weight"].clone() if "weight" in tensors else tensors["up"] @ tensors["down"]
    weight.diagonal().add_(1)
    return weight, tensors["bias"]


def _low_rank(first: Tensors, second: Tensors) -> Tensors:
    """`(I + U2 D2)(I + U1 D1)` as `I + [U1 U2] [D1; D2 + D2 U1 D1]`."""
    through = second["down"] + (second["down"] @ first["up"]) @ first["down"]
    moved = second["up"] @ (second["down"] @ first["bias"])
    return {
        "down": torch.cat((first["down"], through)),
        "up": torch.cat((first["up"], second["up"]), 1),
        "bias": first["bias"] + second["bias"] + moved,
    }
