"""The part of a model that is captured: all of one with a language-model head, else its decoder.

What stands on a decoder without such a head (a classifier's scores, a reward) is small and is left
to the model's own code. Of those models the graphs give the decoder's last hidden state, where
those of others give logits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from .arguments import Forward


class HiddenStateOutput(NamedTuple):
    """What a decoder gives, under the name that captured functions ask for.

    Attributes:
        logits: its last hidden state [B, T, H].
    """

    logits: torch.Tensor


def decoder_name(model: Any) -> str | None:
    """Return the attribute of a model that is the decoder under a head which gives no logits.

    None for a model with a language-model head, and for one that is no decoder with a head.
    """
    if model.get_output_embeddings() is not None:
        return None
    name: str = getattr(model, "base_model_prefix", "")
    return name if name and name in getattr(model, "_modules", {}) else None


def decoder_path(model: Any) -> tuple[str, ...]:
    """Return the attributes that lead to the decoder inside of a model around it; () if none is.

    (That is one of vision and language, whose config has a part about text.)
    """
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return ()
    decoder = model.get_decoder()
    name = next((n for n, module in model.named_modules() if n and module is decoder), None)
    return tuple(name.split(".")) if name else ()


def traced_forward(model: Any, name: str | None) -> Forward:
    """Return the function of a user's model that is traced, called as ``forward(model, ...)``.

    Its class may have got another one since.

    Args:
        model: the user's.
        name: its `decoder_name`, which says what the function gives.
    """
    if name is None:
        forward: Forward = type(model).forward
        return forward
    return _of_decoder(name, type(getattr(model, name)).forward)


#: What is traced of decoders, for as long as a compiled model has it.
_traced: WeakValueDictionary[tuple[str, int], Forward] = WeakValueDictionary()


def _of_decoder(name: str, inner: Forward) -> Forward:
    known = _traced.get((name, id(inner)))
    if known is not None:  # it refers to `inner`, whose identity is its own until then
        return known

    @functools.wraps(inner)
    def forward(model: Any, *args: Any, **kwargs: Any) -> HiddenStateOutput:
        output = getattr(model, name)(*args, **kwargs)  # with the hooks that it has
        return HiddenStateOutput(output.last_hidden_state)

    _traced[name, id(inner)] = forward
    return forward
