"""Neighbouring surrogates as one, where that is exact.

Where several sublayers in a row are skipped, their surrogates are applied one after the other with
nothing in between, and the composition of two is often a surrogate again::

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
from .surrogate import Surrogate, SurrogateKind

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ComposedSurrogate:
    """One or more surrogates, applied one after the other.

    Attributes:
        kind: of the one surrogate that they are together.
        rank: likewise; 0 unless it is a low-rank map.
        members: the surrogates, in the order of the stream.
    """

    kind: SurrogateKind
    rank: int
    members: tuple[Surrogate, ...]

    @classmethod
    def of(cls, surrogate: Surrogate) -> ComposedSurrogate:
        """Return a surrogate alone."""
        return cls(surrogate.kind, surrogate.rank, (surrogate,))

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the content: the digests of the members."""
        return tuple(member.digest for member in self.members)

    def then(self, surrogate: Surrogate) -> ComposedSurrogate | None:
        """Return both as one; None where they have no common form, or one that is no cheaper."""
        kinds = {self.kind, surrogate.kind}
        members = (*self.members, surrogate)
        if kinds == {"low_rank"}:
            rank = self.rank + surrogate.rank
            cheaper = rank < (surrogate.width or 0)
            return ComposedSurrogate("low_rank", rank, members) if cheaper else None
        if kinds <= {"scale", "diagonal"}:
            return ComposedSurrogate("scale" if kinds == {"scale"} else "diagonal", 0, members)
        composable = "linear" in kinds and "normalized" not in kinds
        return ComposedSurrogate("linear", 0, members) if composable else None

    def tensors(self, device: torch.device) -> Tensors:
        """Return the tensors of the one surrogate, float64 on `device`, by name."""
        first, *others = self.members
        tensors, kind = _tensors(first, device), first.kind
        for member in others:
            tensors, kind = _composed(kind, tensors, member.kind, _tensors(member, device))
        return tensors


def compose_surrogates(
    plan: SkipPlan, phase: Phase, neighbours: bool = True
) -> dict[Sublayer, ComposedSurrogate]:
    """Return what replaces each sublayer that does not run in a phase.

    Args:
        plan: what is skipped, and the surrogates.
        phase: prefill or decode.
        neighbours: whether neighbouring surrogates are composed. The last of these sublayers then
            has the composed surrogate, and the others are missing: they pass the stream on.
    """
    found: dict[Sublayer, ComposedSurrogate] = {}
    last: Sublayer | None = None  # its surrogate may be composed with the next one
    for sublayer in plan.sublayers:
        action, surrogate = plan.action(phase, sublayer), plan.surrogates.get(sublayer)
        if action is not Action.SKIP or not neighbours:
            last = None  # K/V are written from the stream as it is before the sublayer
        if action is Action.RUN or surrogate is None:
            continue
        before = found.get(last) if last is not None else None
        composed = before.then(surrogate) if before is not None else None
        if composed is not None and last is not None:
            del found[last]
        found[sublayer] = composed or ComposedSurrogate.of(surrogate)
        last = sublayer
    return found


class SurrogateTensors:
    """Tensors of composed surrogates on a device, shared for as long as a program uses them."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[object, ...], _Tensors] = WeakValueDictionary()

    def get(
        self, sublayer: Sublayer, composed: ComposedSurrogate, like: Mapping[str, torch.Tensor]
    ) -> _Tensors:
        """Return the tensors of a composed surrogate, by name.

        Args:
            sublayer: which it replaces, for the message.
            composed: the composed surrogate.
            like: for each tensor an example of its shape, dtype and device.

        Raises:
            PlanError: names `sublayer` where a shape differs: the plan is of another model.
        """
        example = next(iter(like.values()))
        key = (*composed.key, example.device, *(t.dtype for t in like.values()))
        known = self._known.get(key)
        if known is None:
            made = composed.tensors(example.device)
            for name, tensor in like.items():
                if made[name].shape != tensor.shape:
                    raise PlanError(
                        f"{sublayer}: {name} of its {composed.kind} surrogate has shape "
                        f"{list(made[name].shape)}, but the model needs {list(tensor.shape)}; it "
                        "was fitted on another model"
                    )
            known = _Tensors({n: made[n].to(t.dtype).contiguous() for n, t in like.items()})
            self._known[key] = known
        return known


class _Tensors(dict[str, torch.Tensor]):
    """Tensors by name; a dictionary that can be referred to weakly."""

    __slots__ = ("__weakref__",)


def _tensors(surrogate: Surrogate, device: torch.device) -> Tensors:
    return {
        name: torch.tensor(value, device=device).to(torch.float64)
        for name, value in surrogate.tensors.items()
    }


def _composed(
    kind: SurrogateKind, first: Tensors, second_kind: SurrogateKind, second: Tensors
) -> tuple[Tensors, SurrogateKind]:
    """Return `first`, then `second`, as one."""
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
    """Return a surrogate as `x M^T + c`: M [H, H] and c [H]."""
    if "factor" in tensors:
        factor = tensors["factor"].expand(hidden)
        return torch.diag(factor), torch.zeros_like(factor)
    weight = tensors["weight"].clone() if "weight" in tensors else tensors["up"] @ tensors["down"]
    weight.diagonal().add_(1)
    return weight, tensors["bias"]


def _low_rank(first: Tensors, second: Tensors) -> Tensors:
    """Return `(I + U2 D2)(I + U1 D1)` as `I + [U1 U2] [D1; D2 + D2 U1 D1]`."""
    through = second["down"] + (second["down"] @ first["up"]) @ first["down"]
    moved = second["up"] @ (second["down"] @ first["bias"])
    return {
        "down": torch.cat((first["down"], through)),
        "up": torch.cat((first["up"], second["up"]), 1),
        "bias": first["bias"] + second["bias"] + moved,
    }
