"""What steps that are handed views see of their buffers: one object, which each shows more of."""

from __future__ import annotations

from collections.abc import Sequence

from .buffers import CacheBuffers
from .layer_spec import LayerCacheSpec
from .views import DynamicCacheView, LayerView


class StepViews:
    """Views of some buffers, which keep them, for one step after the other.

    Attributes:
        specs: what layers have, also those that store nothing in the buffers.
    """

    def __init__(self, buffers: CacheBuffers, specs: Sequence[LayerCacheSpec]) -> None:
        self.specs, self._lengths = specs, buffers.lengths
        room = buffers.room
        layers = [LayerView(s, *buffers.layer(i, s, room)) for i, s in enumerate(specs)]
        self._view = DynamicCacheView(layers, self._lengths, self._lengths, prefill=False)
        self._whole = [(layer, layer.keys, layer.values) for layer in layers]

    def of(self, total: int, tokens: int, prefill: bool) -> DynamicCacheView:
        """Return views for a step, in the place of those of the one before; see `step_view`."""
        view, lengths = self._view, self._lengths
        for layer, keys, values in self._whole:
            if keys is not None and values is not None:
                layer.keys, layer.values = keys.narrow(2, 0, total), values.narrow(2, 0, total)
        view.filled, view.new = lengths.narrow(0, 0, total), lengths.narrow(0, 0, tokens)
        view.prefill = prefill
        return view


def step_view(
    buffers: CacheBuffers,
    specs: Sequence[LayerCacheSpec],
    total: int,
    tokens: int,
    prefill: bool,
) -> DynamicCacheView:
    """Return views of the first tokens of `buffers`, for as long as no other step is begun on them.

    Args:
        buffers: have room for them.
        specs: what layers have, also those that store nothing in the buffers.
        total: tokens, with the new ones.
        tokens: how many are new.
        prefill: whether these are all there is.
    """
    views = buffers.views
    if views is None or views.specs is not specs:
        views = buffers.views = StepViews(buffers, specs)
    return views.of(total, tokens, prefill)
