"""What the forward of a compiled model returns, in the order of transformers' outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..kv_cache.argument_names import output_fields
from ..kv_cache.cache import SkipCache


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
) -> Any:
    """Return the output of a model whose forward calls its cache `cache_name`.

    Args:
        cache_name: the name.
        loss: of the labels, a scalar; None without labels.
        logits: [B, kept, V].
        cache: the request's; None where the caller wants none.
        hidden_states: [B, T, H] each, one more than there are layers; None where nobody asked.
    """
    given: dict[str, Any] = {"loss": loss, "logits": logits, "hidden_states": hidden_states}
    if cache_name == "cache_params":
        return StatefulOutput(**given, cache_params=cache)
    return CausalLMOutputWithPast(**given, **output_fields(CausalLMOutputWithPast, cache))
