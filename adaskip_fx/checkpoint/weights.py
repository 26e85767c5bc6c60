"""The weights of packed layers: the model's own, with zeros where a branch adds nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adaskip_passes import UnsupportedError

from ..plans.sublayer import Kind
from .layout import Layout, ends_branch
from .packing import PackedLayer

Weights = Mapping[str, torch.Tensor]
_KINDS: tuple[Kind, Kind] = ("attention", "ffn")


def packed_weights(
    weights: Weights,
    layout: Layout,
    packed: Sequence[PackedLayer],
    divisors: Mapping[tuple[int, Kind], float],
) -> dict[str, torch.Tensor]:
    """Return the state dict of the model with packed layers.

    Args:
        weights: The model's state dict. Tensors that stay as they are are not copied.
        layout: Of its layers.
        packed: The new layers, in order.
        divisors: By layer of the model and branch, what the branch is divided by.

    Raises:
        UnsupportedError: A branch that is to be zero or divided ends in nothing that is known.
    """
    inside = f"{layout.layers}."
    result = {name: value for name, value in weights.items() if not name.startswith(inside)}
    by_layer = _by_layer(weights, inside)
    for number, layer in enumerate(packed):
        for kind in _KINDS:
            source, template = layer.source(kind), layer.template(kind)
            own = {n: t for n, t in by_layer[template].items() if layout.owner(n) == kind}
            divisor = divisors.get((template, kind), 1.0) if source is not None else None
            for name, tensor in _divided(own, divisor, f"{template}.{kind}").items():
                result[f"{inside}{number}.{name}"] = tensor
    return result


def _by_layer(weights: Weights, inside: str) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if name.startswith(inside):
            layer, _, rest = name.removeprefix(inside).partition(".")
            found.setdefault(int(layer), {})[rest] = tensor
    return found


def _divided(own: Weights, divisor: float | None, sublayer: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a branch, divided where it ends; by None: zeros there."""
    if divisor == 1.0:
        return dict(own)
    ends = {name for name in own if ends_branch(name)}
    if not ends:
        raise UnsupportedError(
            f"{sublayer} ends in nothing that is known by name ({', '.join(sorted(own))}), so its "
            "plan does not become a plain checkpoint: run it with adaskip_fx.compile"
        )

    def end(tensor: torch.Tensor) -> torch.Tensor:
        if divisor is None:
            return torch.zeros_like(tensor)
        return (tensor.double() / divisor).to(tensor.dtype)

    return {name: end(tensor) if name in ends else tensor for name, tensor in own.items()}
