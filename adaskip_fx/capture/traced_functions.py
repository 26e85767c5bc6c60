"""The functions that Dynamo traces: a step of the model with a cache, for its logits.

There is one for each name that a model's forward may have for its cache. They are written out,
because Dynamo reads their arguments' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..kv_cache.argument_names import cache_argument
from ..kv_cache.views import CacheView
from .arguments import Forward, tokens_of

_Inputs = Mapping[str, Any]


def traced_function(forward: Forward) -> Callable[..., torch.Tensor]:
    """Return the function to trace for a model's forward."""
    return _TRACED[cache_argument(forward)]


def _logits_of_cache(
    model: nn.Module, forward: Forward, cache: CacheView, inputs: _Inputs
) -> torch.Tensor:
    """Return logits [B, kept tokens, vocabulary]; for all models since transformers 5.24."""
    cache.begin(tokens_of(inputs).shape[1])
    logits: torch.Tensor = forward(model, cache=cache, use_cache=True, **inputs).logits
    return logits


def _logits_of_states(
    model: nn.Module, forward: Forward, cache: CacheView, inputs: _Inputs
) -> torch.Tensor:
    """Return logits likewise; before 5.24 for models with mixers alone."""
    cache.begin(tokens_of(inputs).shape[1])
    logits: torch.Tensor = forward(model, cache_params=cache, use_cache=True, **inputs).logits
    return logits


def _logits(model: nn.Module, forward: Forward, cache: CacheView, inputs: _Inputs) -> torch.Tensor:
    """Return logits likewise; before 5.24 for all other models."""
    cache.begin(tokens_of(inputs).shape[1])
    logits: torch.Tensor = forward(model, past_key_values=cache, use_cache=True, **inputs).logits
    return logits


_TRACED = {
    "cache": _logits_of_cache,
    "cache_params": _logits_of_states,
    "past_key_values": _logits,
}
_logits_of_cache.__name__ = _logits_of_states.__name__ = _logits.__name__  # for messages
