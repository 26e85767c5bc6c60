"""What is looked at before any forward of a compiled model: its mode, its config, gradients."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from .checked_arguments import refuse_transformed

if TYPE_CHECKING:
    from .types import CompiledCausalLM

logger = logging.getLogger(__name__)

#: Outputs of a model besides logits and cache, which no graph is captured with.
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def check_call(model: CompiledCausalLM, embeddings: Any, goes_on: bool) -> None:
    """Refuse a call of a model in a state that no graph is captured in.

    Args:
        model: a compiled model.
        embeddings: its ``inputs_embeds``, if any.
        goes_on: whether the call goes on with a request, which keeps to the config it had.

    Raises:
        RuntimeError: the model is in training mode.
        ValueError: its config asks for outputs that are not captured.
        NotImplementedError: torch.func transforms its weights or inputs.
    """
    if not goes_on:
        refuse_outputs(model)
    if model.training:
        raise RuntimeError("a compiled model is for inference only; call eval() on it")
    if torch.is_grad_enabled():
        wanted = [*model.parameters(), *([] if embeddings is None else [embeddings])]
        wanted = [t for t in wanted if getattr(t, "requires_grad", False)]
        for tensor in wanted:
            refuse_transformed(tensor)
        if wanted:
            _say_detached()


def refuse_outputs(model: Any) -> None:
    """Refuse a config that asks for outputs which a captured graph does not have.

    Raises:
        ValueError: it asks for one.
    """
    for asked in _OUTPUTS:
        if getattr(model.config, asked, False):
            raise ValueError(
                f"the model's config says {asked}=True, which a compiled model does not return; "
                "set it to False"
            )


def not_supported(name: str) -> NotImplementedError:
    """Return the refusal of an argument of forward that there is no graph for."""
    way = "call the original model"
    if name == "output_attentions":
        way = (
            "attention in one kernel has no weights to give; call the original model, loaded with "
            "attn_implementation='eager'"
        )
    return NotImplementedError(f"forward({name}=...) is not supported by adaskip_fx yet; {way}")


@functools.cache
def _say_detached() -> None:
    logger.warning(
        "a compiled model was called with gradients on: what it returns is detached, as if under "
        "torch.no_grad(); train the original model"
    )
