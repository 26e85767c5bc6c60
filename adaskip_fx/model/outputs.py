"""What the forward of a compiled model returns, in the order of transformers' outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..kv_cache.argument_names import output_fields
from ..kv_cache.cache import SkipCache
from ..utils.transformers_internals import OFFSETS
from ..utils.weak_cache import weakly_cached

#: What outputs of models of images have besides: states, and since transformers 5.24 all that the
#: encoder gave (`image_hidden_states` is a property of that); up to 5.19 how far positions are
#: behind tokens.
_OF_IMAGES = (
    OFFSETS,
    *("image_hidden_states", "video_hidden_states", "audio_hidden_states"),
    *("image_outputs", "video_outputs", "audio_outputs"),
)
_FIELDS = {"loss", "logits", "hidden_states"}


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
    of_images: Mapping[str, Any] | None = None,
) -> Any:
    """Return the output of a model whose forward calls its cache `cache_name`.

    Args:
        cache_name: the name.
        loss: of the labels, a scalar; None without labels.
        logits: [B, kept, V].
        cache: the request's; None where the caller wants none.
        hidden_states: [B, T, H] each, one more than there are layers; None where nobody asked.
        kind: its class; `image_output` of models that give something of images.
        of_images: what that is, by its fields.
    """
    given: dict[str, Any] = {"loss": loss, "logits": logits, "hidden_states": hidden_states}
    if cache_name == "cache_params":
        return StatefulOutput(**given, cache_params=cache)
    return kind(**given, **output_fields(kind, cache), **(of_images or {}))


@weakly_cached
def returned_output(forward: Callable[..., Any]) -> type[ModelOutput] | None:
    """Return the class of what a forward returns, by its annotation, if it has one."""
    returned = inspect.signature(forward).return_annotation
    kinds = (k for k in (returned, *get_args(returned)) if isinstance(k, type))
    return next((k for k in kinds if issubclass(k, ModelOutput)), None)


@weakly_cached
def image_output(forward: Callable[..., Any]) -> type[ModelOutput] | None:
    """Return the class of what a forward returns if that has what became of images."""
    kind = returned_output(forward)
    names = {f.name for f in fields(kind)} if kind is not None else set()
    return kind if names >= _FIELDS and not names.isdisjoint(_OF_IMAGES) else None


def of_images(output: ModelOutput) -> dict[str, Any]:
    """Return what an output has of images, by its fields."""
    names = {f.name for f in fields(output)}.intersection(_OF_IMAGES)
    return {name: getattr(output, name) for name in names}
