"""What pickle makes of a cache: one of transformers', where it holds what the model itself stores.

So ``torch.save(cache)`` is what it is for a `DynamicCache`, and any compiled model that stores as
much goes on from what ``torch.load`` gives (`adopt_cache`), as does the model itself. Keys and
values that a plan has made differ from the model's, and nothing in a `DynamicCache` would say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import DynamicCache

from ..plans.decisions import plans_of

if TYPE_CHECKING:
    from .cache import SkipCache


def as_dynamic_cache(cache: SkipCache) -> DynamicCache:
    """Return a copy of a cache as transformers' own.

    Raises:
        TypeError: it is not what the model itself would store.
    """
    request = cache.request
    plans = (*plans_of(request.decision), request.decode_plan)
    if cache.stateful or request.left_out or any(p.prefill or p.decode or p.windows for p in plans):
        why = "mixers keep states" if cache.stateful else "its keys and values are of a plan"
        raise TypeError(
            f"this cache cannot be pickled, since {why}; save(path) it, and load it with "
            "load_cache(path) of the compiled model's .adaskip"
        )
    copy = DynamicCache()
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        if cache.length and keys is not None and values is not None:
            held = (tensor.narrow(2, 0, cache.length).clone() for tensor in (keys, values))
            copy.update(*held, layer)
    return copy
