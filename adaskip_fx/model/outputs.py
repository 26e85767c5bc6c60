"""What the forward of a compiled model returns, in the order of transformers' outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..kv_cache.argument_names import output_fields
from ..kv_cache.cache import SkipCache
from ..utils.weak_cache import weakly_cached

#: What outputs of some models of images have besides.
IMAGE_STATES = "image_hidden_states"
_FIELDS = {"loss", "logits", "hidden_states", IMAGE_STATES}


@dataclass
class StatefulOutput(ModelOutput):  # type: ignore[misc]  # transformers is not typed
    """The output of models that call their cache ``cache_params`` (Mamba).

    Attributes:
        loss: of the labels, a scalar; None without labels.
        logits: [B, kept, V].
        cache_params: the request's cache.
        hidden_states: [B, T, H] each; None where nobody asked.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache_params: SkipCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def model_output(
    cache_name: str,
    *,
    loss: torch.Tensor | None,
    logits: torch.Tensor,
    cache: SkipCache | None,
    hidden_states: tuple[torch.Tensor, ...] | None,
    kind: type[ModelOutput] = CausalLMOutputWithPast,
    image_states: torch.Tensor | None = None,
) -> Any:
    """Return the output of a model whose forward calls its cache `cache_name`.

    Args:
        cache_name: the name.
        loss: of the labels, a scalar; None without labels.
        logits: [B, kept, V].
        cache: the request's; None where the caller wants none.
        hidden_states: [B, T, H] each, one more than there are layers; None where nobody asked.
        kind: its class; `image_output` of models that give something of images.
        image_states: what that is.
    """
    given: dict[str, Any] = {"loss": loss, "logits": logits, "hidden_states": hidden_states}
    if cache_name == "cache_params":
        return StatefulOutput(**given, cache_params=cache)
    if image_states is not None:
        given[IMAGE_STATES] = image_states
    return kind(**given, **output_fields(kind, cache))


@weakly_cached
def image_output(forward: Callable[..., Any]) -> type[ModelOutput] | None:
    """Return the class of what a forward returns, by its annotation, if it has states of images."""
    returned = inspect.signature(forward).return_annotation
    kinds = (k for k in (returned, *get_args(returned)) if isinstance(k, type))
    own = (k for k in kinds if issubclass(k, ModelOutput))
    return next((k for k in own if {f.name for f in fields(k)} >= _FIELDS), None)
