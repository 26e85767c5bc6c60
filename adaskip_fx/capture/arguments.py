"""The arguments of a step: of the model's forward, and of the function that is captured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from ..kv_cache.packed_view import PackedCacheView
from ..kv_cache.views import DynamicCacheView, StaticCacheView
from ..utils.weak_cache import weakly_cached

Forward = Callable[..., Any]
AnyCacheView: TypeAlias = DynamicCacheView | StaticCacheView | PackedCacheView


def step_inputs(
    forward: Forward,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
) -> dict[str, Any]:
    """Return the arguments of a step that the model's forward has a name for.

    Args:
        forward: of the model.
        input_ids: int64 [B, T]; or embeddings [B, T, H] in their place.
        position_ids: int64 [B, T]; of some models of images in axes, [A, B, T].
        attention_mask: bool [B, stored + T]; None without padding.
        logits_to_keep: 0 for the logits of all tokens, 1 for those of the last; or the indices of
            some, int64 [K], in whose place a forward that takes none is asked for all.
    """
    has = forward_names(forward)
    name = "inputs_embeds" if is_embedded(input_ids) else "input_ids"
    inputs: dict[str, Any] = {name: input_ids}
    if "position_ids" in has:
        inputs["position_ids"] = position_ids
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if "logits_to_keep" in has:
        by_index = isinstance(logits_to_keep, torch.Tensor)
        inputs["logits_to_keep"] = 0 if by_index and not takes_indices(forward) else logits_to_keep
    if "return_dict" in has:  # whatever the config says
        inputs["return_dict"] = True
    return inputs


def is_embedded(tokens: torch.Tensor) -> bool:
    """Return whether new tokens are embeddings [B, T, H]; if not, they are ids [B, T]."""
    return tokens.dim() == 3


def tokens_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the new tokens among a step's arguments: ids, or embeddings in their place."""
    tokens: torch.Tensor = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    return tokens


def takes_logits_to_keep(forward: Forward) -> bool:
    """Return whether a forward can be asked for the logits of some tokens alone."""
    return "logits_to_keep" in forward_names(forward)


def takes_indices(forward: Forward) -> bool:
    """Return whether a forward's `logits_to_keep` may be a tensor, going by its annotation."""
    return "Tensor" in forward_names(forward).get("logits_to_keep", "")


@weakly_cached
def forward_names(forward: Forward) -> Mapping[str, str]:
    """Return the annotations of a forward's parameters, as text, by their names."""
    parameters = inspect.signature(forward).parameters.values()
    return {p.name: str(p.annotation) for p in parameters}


def by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name, those without a parameter of their own among them."""
    bound = signature.bind(*args, **kwargs).arguments
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    more = {k: v for name in rest for k, v in bound.pop(name, {}).items()}
    return {**bound, **more}


def bind_arguments(
    model: torch.nn.Module,
    forward: Forward,
    cache: AnyCacheView,
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the captured function's arguments by name, as bindings and guards look them up."""
    return {"model": model, "forward": forward, "cache": cache, "inputs": inputs}
