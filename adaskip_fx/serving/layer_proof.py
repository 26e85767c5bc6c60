"""Skip branches of a decoder layer, and run the rewritten layer before it is believed.

A layer of which both branches are skipped computes with stand-ins alone, so what it should give is
known: for a stream of small whole numbers and two powers of two as surrogates, exactly the product.
A layer that does anything else with its stream (another norm, a multiplier, branches in parallel)
gives something else, and is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adaskip_fx.plans.actions import PlanError
from adaskip_fx.plans.sublayer import Kind
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.serving.layouts import LAYOUTS, Layout, layouts_of, module_names
from adaskip_fx.serving.stand_ins import Nothing, PassOn, StreamSurrogate

_FACTORS: Mapping[Kind, float] = {"attention": 0.5, "ffn": 0.25}
_TOLERANCE = 1e-5  #: of a multiplier's rounding; without one the numbers are exact


def skip(
    layer: nn.Module,
    layout: Layout,
    kind: Kind,
    surrogate: Surrogate | None,
    *,
    as_tuple: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> None:
    """Replace the modules of one branch of a layer, in place.

    Args:
        layer: A decoder layer.
        layout: What its modules are.
        kind: Which branch.
        surrogate: What the branch becomes; None where the stream passes through.
        as_tuple: Whether the layer unpacks (output, attention weights) from its attention.
        dtype: Of the stream.
        device: Of the stream; None for torch's default device.

    Raises:
        PlanError: Branches are in parallel, and there is a surrogate.
    """
    chain, body = layout.chain(kind), layout.body(kind)
    unpacked = as_tuple and kind == "attention"
    if layout.parallel:
        if surrogate is not None:
            raise PlanError(
                f"a {surrogate.kind} surrogate in a layer whose attention and FFN are in parallel "
                f"({layout.name}): its modules do not see the stream; use a plan without "
                "surrogates, plan.with_surrogates(NO_SURROGATES)"
            )
        setattr(layer, body, Nothing(unpacked))
        return
    multiplier = float(getattr(layer, layout.multiplier)) if layout.multiplier else 1.0
    for number, name in enumerate(chain):
        tuples = unpacked and name == body
        if number:
            setattr(layer, name, PassOn(tuples))
            continue
        made = StreamSurrogate(
            surrogate, multiplier=multiplier, as_tuple=tuples, dtype=dtype, device=device
        )
        setattr(layer, name, made)


def proven_layout(layer: nn.Module, hidden: int, *, as_tuple: bool = False) -> Layout:
    """Return the layout of a decoder layer: that which it computes by.

    Args:
        layer: A decoder layer; it is left as it is.
        hidden: The width of the stream.
        as_tuple: Whether it unpacks (output, attention weights) from its attention.

    Raises:
        PlanError: Its modules are those of no layout, or it computes something else.
    """
    name, why = type(layer).__name__, ""
    for layout in layouts_of(layer):
        try:
            if _computes_by(layer, layout, hidden, as_tuple):
                return layout
            why = f"it is built like a {layout.name} layer, and adds its branches in another way"
        except Exception as error:
            why = f"it is built like a {layout.name} layer, and cannot be run as one ({error!r})"
    if not why:
        known = ", ".join(layout.name for layout in LAYOUTS)
        why = f"its modules ({module_names(layer)}) are those of no known layout ({known})"
    raise PlanError(
        f"{name}: no plan can be served with this layer: {why}; serve the model without a plan, or "
        "try another implementation of it (vLLM: --model-impl transformers)"
    )


def _computes_by(layer: nn.Module, layout: Layout, hidden: int, as_tuple: bool) -> bool:
    bare = copy.copy(layer)
    bare._modules = dict(layer._modules)  # the copy's children may be replaced
    factors = dict.fromkeys(_FACTORS, 1.0) if layout.parallel else dict(_FACTORS)
    for kind, factor in factors.items():
        surrogate = None if layout.parallel else Surrogate.scale(factor)
        skip(bare, layout, kind, surrogate, as_tuple=as_tuple)
    factor = factors["attention"] * factors["ffn"]
    dtype = next(layer.parameters()).dtype if layout.others else torch.float32
    h, r = (torch.arange(s, s + 2 * hidden, dtype=dtype).remainder(7) - 3 for s in (0, 4))
    h, r = h.view(2, hidden), r.view(2, hidden)
    alone = _run(bare, h, None)
    if "residual" not in inspect.signature(layer.forward).parameters:
        return _equal(alone[0], factor * h)
    both = _run(bare, h, r)
    # Either the stream is a pair, or the residual is a name that the layer does not look at.
    as_pair = _equal(sum(alone), factor * h) and _equal(sum(both), factor * (h + r))
    return as_pair or (_equal(alone[0], factor * h) and _equal(both[0], factor * h))


def _run(layer: nn.Module, h: torch.Tensor, r: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the tensors that a layer gives for a stream, which may be a pair."""
    given: dict[str, Any] = {"hidden_states": h}
    parameters = inspect.signature(layer.forward).parameters
    if "residual" in parameters:
        given["residual"] = r
    for name, parameter in parameters.items():
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if plain and parameter.default is parameter.empty and name not in given:
            given[name] = None
    with torch.no_grad():
        result = layer.forward(**given)
    parts = result if isinstance(result, tuple) else (result,)
    return [p for p in parts if isinstance(p, torch.Tensor)]


def _equal(found: torch.Tensor | int, wanted: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return torch.allclose(found.to(wanted.dtype), wanted, rtol=_TOLERANCE, atol=_TOLERANCE)
