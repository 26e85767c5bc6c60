"""The loss of a call with labels: the model's own loss function, on the logits of the plan.

A forward of transformers' hands ``loss_function`` its logits, its labels and whatever else it was
called with. Whether a model does just that is seen once: it is run on a few tokens with labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from adaskip_passes._torch import one_at_a_time

from ..capture.arguments import forward_names
from ..capture.state import State

if TYPE_CHECKING:
    from .types import CompiledCausalLM

_ITS_OWN = frozenset({"logits", "labels", "vocab_size"})
#: Relative error of a sum in another order.
_TOLERANCE = 1e-4

_proven: WeakKeyDictionary[State, set[Hashable]] = WeakKeyDictionary()


def loss_arguments(loss_function: Callable[..., Any]) -> frozenset[str]:
    """Return which arguments a loss function has besides logits, labels and vocabulary size."""
    named = inspect.signature(loss_function).parameters.values()
    return frozenset(p.name for p in named if p.kind is not p.VAR_KEYWORD) - _ITS_OWN


def check_loss(model: CompiledCausalLM, labels: object, given: Mapping[str, Any]) -> None:
    """Refuse labels of a model whose loss is not what its loss function makes of its logits.

    Args:
        model: a compiled model.
        labels: what forward was called with.
        given: what it was called with for the loss function besides (``num_items_in_batch``).

    Raises:
        TypeError: `labels` is no tensor.
        NotImplementedError: the model makes its loss in another way, or has none.
    """
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor [batch, tokens], not a {type(labels).__name__}")
    state = model._adaskip.graphs.states.current
    key = model.loss_function, frozenset(given)
    proven = _proven.setdefault(state, set())
    if key in proven:
        return
    if not _is_own_loss(model, state, labels, given):
        raise NotImplementedError(
            f"the loss of {type(model).__name__} is not what its loss_function makes of its logits "
            "and labels, so forward(labels=...) is not supported by adaskip_fx yet; make a loss of "
            "the logits, or call the original model"
        )
    proven.add(key)


@torch.no_grad()
def loss_of(
    model: CompiledCausalLM, logits: torch.Tensor, labels: torch.Tensor, given: Mapping[str, Any]
) -> torch.Tensor:
    """Return the loss that the model's own loss function gives, without gradients.

    Args:
        model: a compiled model.
        logits: [B, kept, V].
        labels: int64 [B, kept]; those of the tokens themselves, which the function shifts.
        given: further arguments of the function.
    """
    loss: torch.Tensor = model.loss_function(
        logits=logits, labels=labels, vocab_size=logits.shape[-1], **given
    )
    return loss


@torch.no_grad()
def _is_own_loss(
    model: CompiledCausalLM, state: State, labels: torch.Tensor, given: Mapping[str, Any]
) -> bool:
    """Return whether the user's own forward gives the loss that `loss_of` makes of its logits."""
    graphs = model._adaskip.graphs
    named = forward_names(graphs.forward)
    ids = state.reference.steps["prefill"][0].ids.to(graphs.device)
    few = {n: ids.flip(1) if _is_like(v, labels) else v for n, v in given.items()}
    asked: dict[str, Any] = {"use_cache": False, "return_dict": True}
    asked = {name: value for name, value in asked.items() if name in named}
    with one_at_a_time, state.reference.implementations_of(model):  # the model is another meanwhile
        output = graphs.forward(model, input_ids=ids, labels=ids, **asked, **few)
    theirs = getattr(output, "loss", None)
    if theirs is None:
        return False
    mine = loss_of(model, output.logits, ids, few)
    error = float((mine - theirs).abs().max())
    return error <= _TOLERANCE * max(1.0, float(theirs.abs().max()))


def _is_like(value: object, labels: torch.Tensor) -> bool:
    """Return whether a value says something of every token, as labels do."""
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape == labels.shape
