"""The compiled model, as transformers and its users see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.generation import GenerationMode

from ..kv_cache.adopt_cache import own_cache
from ..kv_cache.cache import SkipCache
from ..kv_cache.drafting import Drafting
from ..parallel.random_numbers import share_random_numbers
from ..parallel.ranks import Ranks
from ..runtime.runtime import Runtime
from ..utils.generation_internals import GenerateHooks, is_whole_text, stop_tokens
from ..utils.parallel_internals import parallel_group
from ..utils.transformers_types import (
    DecodingCall,
    GenerationConfigLike,
    MakeCandidates,
    ModelKwargs,
)
from . import draftable, generation
from .handle import Handle
from .host import recall_offsets
from .led import decode_with_drafts
from .shared_criteria import share_criteria

if TYPE_CHECKING:
    from .types import CompiledCausalLM

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
_ONE_TOKEN_A_STEP = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
#: What ``cache_implementation`` may be: the cache that a compiled model has grows, and stays put.
_CACHES = (None, "dynamic", "static")
#: Drafts that cannot be had from a compiled model, by the field of the generation config.
_DRAFTS = {
    "assistant_early_exit": "drafts of the model's first layers are",
    "use_mtp": "drafts of the model's own heads for several tokens are",
    "speculation_type": "drafts that need the model's hidden states are",
}


class CompiledModel(GenerateHooks):
    """What the generated subclass adds to the model's own class."""

    _adaskip: Runtime

    @property
    def adaskip(self) -> Handle:
        """The controls of this compiled model; print them."""
        return Handle(self._adaskip)

    def _adaskip_prepare_cache(
        self,
        config: GenerationConfigLike,
        model_kwargs: ModelKwargs,
        mode: GenerationMode,
        max_length: int,
    ) -> None:
        """Put the request's cache among the arguments of forward, and tell it the request's limit.

        Raises:
            NotImplementedError: what is asked for needs another loop or another cache.
            ValueError: a cache is passed and another one asked for, as in transformers.
        """
        _refuse_ways(config, mode)
        _refuse_clocks(config, mode, self._adaskip.ranks)
        if config.do_sample:
            share_random_numbers(self._adaskip.ranks, self._adaskip.device)
        ends = stop_tokens(config)
        name = self._adaskip.generate_argument
        cache = model_kwargs.get(name)
        if cache is not None:
            if config.cache_implementation is not None:
                raise ValueError(
                    f"cache_implementation={config.cache_implementation!r} asks for a new cache, "
                    f"but {name} was passed as well; leave one of the two out"
                )
            cache = model_kwargs[name] = own_cache(cache, self._adaskip)
            cache.request.stop_tokens = ends
        elif config.use_cache is not False:
            cache = model_kwargs[name] = self._adaskip.new_cache(stop_tokens=ends)
        if isinstance(cache, SkipCache):
            cache.expected = max(max_length, getattr(config, "max_cache_len", None) or 0)

    def _adaskip_prompt(
        self, input_ids: torch.Tensor, config: GenerationConfigLike, model_kwargs: ModelKwargs
    ) -> AbstractContextManager[None]:
        """Return the context for what is new of a prompt, which may be a single token.

        Whoever drafts is called once for each draft, with the text so far. All but the first of
        these are no prompts: their tokens were decoded, by another model.
        """
        cache = model_kwargs.get(self._adaskip.generate_argument)
        if not isinstance(cache, SkipCache):
            return nullcontext()
        if not config.is_assistant:
            return cache.prompt()
        if cache.drafting is None:
            cache.drafting = Drafting(input_ids.shape[1])
        return nullcontext()

    def _adaskip_assisted(
        self: CompiledCausalLM,
        input_ids: torch.Tensor,
        config: GenerationConfigLike,
        model_kwargs: ModelKwargs,
    ) -> AbstractContextManager[None]:
        """Return the context for a prompt and drafts of what follows it, which are verified."""
        cache, new = model_kwargs.get(self._adaskip.generate_argument), input_ids.shape[1]
        if not isinstance(cache, SkipCache):
            return nullcontext()
        embedded, mask = (model_kwargs.get(name) for name in ("inputs_embeds", "attention_mask"))
        if embedded is not None:  # the prompt, and there are no ids of it
            if mask is not None and bool(mask.all()):  # transformers 5.17 cuts it to the ids
                del model_kwargs["attention_mask"]
            return cache.verifying(Drafting(cache.length + embedded.shape[1]))
        if cache.length < new and is_whole_text(input_ids, config, model_kwargs):
            return cache.verifying(Drafting(new, seen=cache.length))
        return cache.verifying(Drafting(cache.length + new))

    def _adaskip_decode(self: CompiledCausalLM, call: DecodingCall) -> Any:
        """Decode without waiting for a GPU (`generation`), or with drafts (`drafted`)."""
        runtime = self._adaskip
        share_criteria(call.stopping_criteria, runtime.ranks)
        cache, speculation = call.model_kwargs.get(runtime.generate_argument), runtime.speculation
        if not isinstance(cache, SkipCache) or not generation.serves(call):
            return None
        if speculation is None or not draftable.serves(cache):
            return generation.run(self, generation.DecodedRequest(self, call))
        with CompiledModel._adaskip_assisted(self, call.input_ids, call.config, call.model_kwargs):
            return decode_with_drafts(self, call, speculation)

    def _adaskip_draft(
        self: CompiledCausalLM, call: DecodingCall, assistant: MakeCandidates, model: Any
    ) -> Any:
        """Decode with an assistant's drafts as well, where the model decodes with drafts anyway.

        Raises:
            UnsupportedError: The assistant `model` runs on several ranks, of which one is to ask.
        """
        runtime = self._adaskip
        cache, speculation = call.model_kwargs.get(runtime.generate_argument), runtime.speculation
        lossy = getattr(call.config, "assistant_ensemble_weight", None) is not None
        if speculation is None or lossy or call.input_ids.shape[0] > 1:
            return None
        if not isinstance(cache, SkipCache) or not generation.serves(call):
            return None
        if not draftable.serves(cache):
            return None
        if model is not None and parallel_group(model) is not None:
            runtime.ranks.refuse(
                "an assistant_model that is on several ranks itself, beside decoding=,",
                "load it whole in every process, of which rank 0's drafts, or leave decoding= out",
            )
        with CompiledModel._adaskip_assisted(self, call.input_ids, call.config, call.model_kwargs):
            return decode_with_drafts(self, call, speculation, assistant)

    def _adaskip_recall(self: CompiledCausalLM, model_kwargs: ModelKwargs) -> None:
        cache = model_kwargs.get(self._adaskip.generate_argument)
        path = self._adaskip.decoder_path
        if isinstance(cache, SkipCache) and cache.length and path:
            recall_offsets(self, path, cache.request.offsets)

    def _adaskip_next_kwargs(self, model_kwargs: ModelKwargs) -> ModelKwargs:
        """Leave out a mask that says nothing, and tell the cache that one says nothing new.

        To know what a mask says a step has to read it, which means waiting for the device. Without
        padding it is all ones; else it is the last one and ones for the new tokens.
        """
        cache = model_kwargs.get(self._adaskip.generate_argument)
        if isinstance(cache, SkipCache):
            if cache.padded:
                cache.mask.goes_on(model_kwargs.get("attention_mask"))
            else:
                model_kwargs.pop("attention_mask", None)
        return model_kwargs

    def _refuse_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "continuous batching (generate_batch, a paged cache) is not supported by adaskip_fx "
            "yet; call generate on a padded batch, or the original model"
        )

    generate_batch = init_continuous_batching = continuous_batching_context_manager = (
        _refuse_batching
    )

    def _apply(
        self: CompiledCausalLM, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Any:
        """Refuse ``to``, ``cuda``, ``half`` where they would change the shared tensors."""
        for tensor in (*self.parameters(), *self.buffers()):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            after = fn(probe)
            if after.dtype != probe.dtype or after.device != probe.device:
                raise RuntimeError(
                    "a compiled model shares its parameters with the original model, so it "
                    f"cannot be moved from {probe.dtype} on {probe.device} to {after.dtype} on "
                    f"{after.device}; move the original and compile it again"
                )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a compiled model cannot be copied; compile the original again")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a compiled model cannot be pickled; save the original model and the profile"
        )


def _refuse_clocks(config: GenerationConfigLike, mode: GenerationMode, ranks: Ranks) -> None:
    """Refuse a limit of time where several ranks generate, in loops that do not ask the first."""
    limit = getattr(config, "max_time", None)
    if limit is not None and not ranks.alone and mode not in _ONE_TOKEN_A_STEP:
        raise NotImplementedError(
            f"max_time={limit!r} of {mode.value.replace('_', ' ')} is not supported where a model "
            "runs on several ranks: each would stop by its own clock; use max_new_tokens"
        )


def _refuse_ways(config: GenerationConfigLike, mode: GenerationMode) -> None:
    """Refuse ways to generate that a compiled model has not."""
    if mode not in _MODES:
        raise NotImplementedError(
            f"{mode.value.replace('_', ' ')} is not supported by adaskip_fx yet: transformers has "
            "it no longer, and repositories of its loops are not tested; use greedy search, "
            "sampling or beam search, or the original model"
        )
    for field, drafts in _DRAFTS.items():
        if getattr(config, field, None):
            raise NotImplementedError(
                f"{field}={getattr(config, field)!r} is not supported by adaskip_fx yet: {drafts} "
                "not captured; pass an assistant_model, or use prompt_lookup_num_tokens"
            )
    if config.cache_implementation not in _CACHES:
        raise NotImplementedError(
            f"cache_implementation={config.cache_implementation!r} is not supported: a compiled "
            "model makes its own cache, with buffers only for the attention that runs; leave it "
            "out, of the generation config as well ('dynamic' and 'static' mean that cache)"
        )
