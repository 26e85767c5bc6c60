"""What ``generate`` hands on to forward: the cache of the request, and nothing that is its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..kv_cache.cache import SkipCache

#: Arguments of ``generate`` that reach forward: who has a tokenizer for ``stop_strings`` passes it.
_NOT_OF_FORWARD = ("tokenizer", "assistant_tokenizer", "assistant_model")


def following(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return ``prepare_inputs_for_generation`` that keeps the request when the cache goes.

    Phi-3's leaves its cache out at the length where another table of positions begins, so that the
    whole text runs again. What runs is still the request: with its own plan and stop tokens. (It
    leaves out an empty one as well, which can as well be filled.)

    Where drafts are verified, transformers hands on all of a text of which a cache has the
    beginning. What is stored is left out here, as it is where there are no drafts. And it hands
    on to forward what is of ``generate``, which forwards of transformers' take and do not read.

    Args:
        prepare: the method of the model's own class.
    """

    @functools.wraps(prepare)
    def followed(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        name = self._adaskip.generate_argument
        cache = kwargs.get(name)
        drafting = cache.drafting if isinstance(cache, SkipCache) else None
        if drafting is not None and drafting.seen and kwargs.get("is_first_iteration"):
            text = args[0] if args else kwargs["input_ids"]
            kwargs["next_sequence_length"] = text.shape[1] - drafting.seen
        inputs = prepare(self, *args, **kwargs)
        for given in _NOT_OF_FORWARD:
            inputs.pop(given, None)
        if isinstance(cache, SkipCache) and inputs.get(name) is None:
            inputs[name] = cache.new_request() if cache.length else cache
            inputs[name].drafting = drafting
        return inputs

    return followed
