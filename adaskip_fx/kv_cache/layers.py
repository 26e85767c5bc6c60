"""The objects in ``cache.layers``: a layer's part of a request's memory, as transformers names it.

They are made when they are asked for, of the classes that transformers looks for, so that what
its `Cache` says about layers (`has_previous_state`, `get_conv_state`, `is_dummy`) is said by its
own code. They hold the cache, and with it the buffers; they show the filled part, not a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

if TYPE_CHECKING:
    from .cache import SkipCache
    from .layer_spec import LayerCacheSpec, StateKind


def layers_of(cache: SkipCache) -> list[Any]:
    """Return one object per layer of the model, whether the request stores any of it or not."""
    return [_class_of(spec)(cache, index) for index, spec in enumerate(cache.specs)]


class _Part:
    """What all layers have in common.

    Attributes:
        dtype, device: of keys and values.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: SkipCache, index: int) -> None:
        # (transformers' own would make attributes of what are properties here)
        object.__setattr__(self, "_cache", cache)
        object.__setattr__(self, "_index", index)

    _cache: SkipCache
    _index: int

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse: the object is made at each access, so nothing would come of it."""
        raise NotImplementedError(
            f"a layer of a compiled model's cache has no {name} to be replaced: edit the tensors "
            "in place, or call the cache's own methods"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self._cache.dtype

    @property
    def device(self) -> torch.device:
        """The device of the buffers."""
        return self._cache.device

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back; a state cannot forget one."""
        return not self._cache.specs[self._index].mixes

    def get_seq_length(self) -> int:
        """Return the tokens stored; they are the same for every layer, stored or not."""
        return self._cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys after `query_length` more tokens."""
        return self._cache.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the buffers grow."""
        return -1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._index}, {self._cache.length} tokens)"

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "a layer of a compiled model's cache cannot be changed alone; call the cache's own "
            "crop, reset, reorder_cache, batch_repeat_interleave or batch_select_indices"
        )

    update = lazy_initialization = offload = prefetch = reset = crop = _refuse
    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse
    update_conv_state = update_recurrent_state = activate_past_recording = _refuse


class _Keyed:
    """Keys and values of a layer."""

    supports_early_init = True
    _cache: SkipCache
    _index: int

    @property
    def is_initialized(self) -> bool:
        """Whether there are keys and values."""
        return self._cache.length > 0 and self._cache.keys[self._index] is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """[batch, heads, tokens, dim]; None where a skipped attention stores nothing."""
        return self._cache.filled(self._index, self._cache.keys[self._index])

    @property
    def values(self) -> torch.Tensor | None:
        """[batch, heads, tokens, dim]; None where a skipped attention stores nothing."""
        return self._cache.filled(self._index, self._cache.values[self._index])


class _Stateful:
    """A mixer's states, by their index among those of their kind."""

    supports_early_init = False
    record_past = False
    _cache: SkipCache
    _index: int

    @property
    def number_of_states(self) -> int:
        """How many states there are of a kind."""
        return len({state.index for state in self._cache.specs[self._index].states})

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        """The last inputs of convolutions, [batch, ...]; None where a skipped mixer keeps none."""
        return self._states("conv")

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        """Recurrent states, [batch, ...]; None where a skipped mixer keeps none."""
        return self._states("recurrent")

    @property
    def is_conv_states_initialized(self) -> dict[int, bool]:
        """Whether a convolution's state holds anything, by index."""
        return {index: state is not None for index, state in self.conv_states.items()}

    @property
    def is_recurrent_states_initialized(self) -> dict[int, bool]:
        """Whether a recurrent state holds anything, by index."""
        return {index: state is not None for index, state in self.recurrent_states.items()}

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """Whether states hold anything yet."""
        return dict.fromkeys(range(self.number_of_states), self._cache.length > 0)

    @property
    def conv_kernel_size(self) -> dict[int, int | None]:
        """How many inputs a convolution's state holds."""
        states = self._cache.specs[self._index].states
        known = {s.index: s.shape[-1] for s in states if s.kind == "conv"}
        return {index: known.get(index) for index in range(self.number_of_states)}

    def _states(self, kind: StateKind) -> dict[int, torch.Tensor | None]:
        found: dict[int, torch.Tensor | None] = dict.fromkeys(range(self.number_of_states))
        found.update(self._cache.states(self._index, kind))
        return found


# The order of bases is what matters: ours answer, transformers' say what kind of layer it is.
_BOTH = (LinearAttentionCacheLayerMixin, CacheLayerMixin)


class AttentionPart(_Part, _Keyed, CacheLayerMixin):  # type: ignore[misc]
    """A layer with keys and values."""


class MixerPart(_Part, _Stateful, LinearAttentionCacheLayerMixin):  # type: ignore[misc]
    """A layer with a mixer's states."""


class MixerAndAttentionPart(_Part, _Keyed, _Stateful, *_BOTH):  # type: ignore[misc]
    """A layer with both."""


class EmptyPart(_Part, getattr(cache_utils, "DummyLayer", object)):  # type: ignore[misc]
    """A layer that has nothing to store: it has only an FFN, or reads another one's keys."""

    supports_early_init = False
    is_initialized = True
    keys = values = None


def _class_of(spec: LayerCacheSpec) -> type[_Part]:
    if spec.attends:
        return MixerAndAttentionPart if spec.mixes else AttentionPart
    return MixerPart if spec.mixes else EmptyPart
