"""The compiled model: a new object of a generated subclass that shares the original's tensors.

The module tree is copied with the parameters and buffers in the copy's memo, so both models use
the same tensors, while configuration, hooks and training flags are each model's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..capture import attention
from ..kv_cache.cache import SkipCache
from ..kv_cache.foreign import own_cache
from ..kv_cache.names import CACHE_NAMES, output_fields, under_one_name
from ..runtime.runtime import Runtime
from . import generation
from .handle import Handle

_STEP_ARGUMENTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        *CACHE_NAMES,
        "use_cache",
        "logits_to_keep",
        "return_dict",
        "cache_position",
    }
)
#: What a model may hand out besides logits and cache, which no graph is captured with.
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class StatefulOutput(ModelOutput):  # type: ignore[misc]  # transformers is not typed
    """What models return that call their cache ``cache_params`` (Mamba).

    Attributes:
        logits: [B, kept, V].
        cache_params: the request's cache.
    """

    logits: torch.Tensor | None = None
    cache_params: SkipCache | None = None


class CompiledModel:
    """What the generated subclass adds to the model's own class."""

    _adaskip: Runtime

    @property
    def adaskip(self) -> Handle:
        """The controls of this compiled model; print them."""
        return Handle(self._adaskip)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by transformers' ``generate``: the request's cache, sized from its limits."""
        if generation_mode not in _MODES:
            raise NotImplementedError(
                f"adaskip_fx does not support {generation_mode.value.replace('_', ' ')} yet; "
                "use greedy search or sampling (num_beams=1, no assistant)"
            )
        if generation_config.cache_implementation is not None:
            raise NotImplementedError(
                f"cache_implementation={generation_config.cache_implementation!r} is not "
                "supported: a compiled model makes its own cache, with storage only for the "
                "attention that runs; leave the argument out"
            )
        stop_tokens = _stop_tokens(generation_config)
        name = self._adaskip.generate_argument
        cache = model_kwargs.get(name)
        if cache is not None:
            cache = own_cache(cache, self._adaskip, max_cache_length)
            cache.request.stop_tokens = stop_tokens
            model_kwargs[name] = cache
        elif generation_config.use_cache is not False:
            model_kwargs[name] = self._adaskip.new_cache(max_cache_length, stop_tokens)

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Called by ``generate`` for what is new of its prompt, which may be a single token."""
        cache = model_kwargs.get(self._adaskip.generate_argument)
        with cache.prompt() if isinstance(cache, SkipCache) else nullcontext():
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, *args, **kwargs
            )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate``, greedy or sampling; see :mod:`adaskip_fx.model.generation`.

        (``custom_generate=`` would be the public way, but takes the streamer away.)
        """
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        cache = model_kwargs.get(self._adaskip.generate_argument)
        if isinstance(cache, SkipCache) and generation.serves(
            generation_config, synced_gpus, model_kwargs
        ):
            return generation.run(self, *given, streamer, model_kwargs, cache)
        return super()._sample(  # type: ignore[misc]
            *given, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Called by ``generate`` between steps: leaves out a mask that says nothing.

        Without padding a mask is all ones, and whoever is handed it must read it to know, which
        means waiting for the device at every step.
        """
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )
        cache = updated.get(self._adaskip.generate_argument)
        if isinstance(cache, SkipCache) and not cache.padded:
            updated.pop("attention_mask", None)
        return updated

    def _refuse_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "continuous batching (generate_batch, a paged cache) is not supported by adaskip_fx "
            "yet; call generate on a padded batch, or the original model"
        )

    generate_batch = init_continuous_batching = continuous_batching_context_manager = (
        _refuse_batching
    )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """``to``, ``cuda``, ``half``: nothing to do, or refused, since tensors are shared."""
        for tensor in (*self.parameters(), *self.buffers()):  # type: ignore[attr-defined]
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


def make_shell(model: PreTrainedModel) -> PreTrainedModel:
    """A model of a generated subclass that shares `model`'s parameters and buffers.

    Raises:
        TypeError, ValueError: `model` is not a decoder of transformers in evaluation mode.
    """
    check_model(model)
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    shell: PreTrainedModel = copy.deepcopy(model, memo)
    base = type(model)
    name = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    methods = {
        "forward": _forward(base.forward),
        "prepare_inputs_for_generation": generation.following(base.prepare_inputs_for_generation),
    }
    shell.__class__ = type(base.__name__, (CompiledModel, base), {**name, **methods})
    if attention.can_be_set(shell) and not attention.is_own(model):
        shell.set_attn_implementation(attention.NAME)
    return shell


def check_model(model: Any) -> None:
    """Refuse what is not a plain transformers decoder in evaluation mode."""
    if isinstance(model, CompiledModel):
        raise TypeError("this model is compiled already; compile the original with another plan")
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        hint = ""
        if isinstance(model, nn.Module) and hasattr(model, "get_base_model"):
            hint = " (a peft model: merge_and_unload() it first)"
        elif hasattr(model, "_orig_mod"):
            hint = " (a torch.compile wrapper: pass the model inside it)"
        raise TypeError(
            f"expected a transformers PreTrainedModel with a language-model head, got {kind}{hint}"
        )
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only models are "
            "supported"
        )
    if model.get_output_embeddings() is None:
        raise TypeError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    _refuse_outputs(model)
    if "forward" in vars(model):
        raise TypeError(
            "the model's forward was replaced on the instance (accelerate hooks do that); load it "
            "without device_map, or remove the hook"
        )
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")


def _forward(base: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(base)
    named = frozenset(signature.parameters) - {"self", "kwargs"}

    @functools.wraps(base)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and named.issuperset(kwargs):  # as `generate` calls it; binding takes longer
            return _run(self, kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        extra = given.pop("kwargs", {})
        given.pop("self")
        return _run(self, {**given, **extra})

    return forward


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="a model compiled by adaskip_fx has graphs of its own"
)
def _run(model: Any, given: dict[str, Any]) -> Any:
    """One forward of the compiled model."""
    _refuse_unsupported(model, given)
    runtime: Runtime = model._adaskip
    given = under_one_name(given, runtime.cache_argument)
    input_ids = _checked_ids(model, given.get("input_ids"))
    cache = given.get(runtime.cache_argument)
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    use_cache = _default(given, "use_cache", model.config)
    handed_back = use_cache or cache is not None  # as most models do with a cache that they fill
    if cache is None:
        if mask is None and not use_cache:
            _refuse_packed(positions)
        cache = runtime.new_cache()
    cache = own_cache(cache, runtime)
    logits = runtime.step(
        input_ids,
        _checked_mask(mask, input_ids, cache),
        _checked_positions(positions, input_ids),
        cache,
        int(given.get("logits_to_keep") or 0),
    )
    kept = cache if handed_back else None
    if not _default(given, "return_dict", model.config):
        return (logits, kept) if kept is not None else (logits,)
    if runtime.cache_argument == "cache_params":
        return StatefulOutput(logits=logits, cache_params=kept)
    return CausalLMOutputWithPast(logits=logits, **output_fields(CausalLMOutputWithPast, kept))


def _default(given: dict[str, Any], name: str, config: Any) -> bool:
    """A flag of forward, which the config decides where the caller does not."""
    value = given.get(name)
    return bool(getattr(config, name, True) if value is None else value)


def _refuse_outputs(model: Any) -> None:
    """Refuse a config that asks for outputs which a captured graph does not have."""
    for asked in _OUTPUTS:
        if getattr(model.config, asked, False):
            raise ValueError(
                f"the model's config says {asked}=True, which a compiled model does not return; "
                "set it to False"
            )


def _refuse_packed(positions: Any) -> None:
    """Refuse what the model would take for several texts in a row, when it keeps no cache."""
    if isinstance(positions, torch.Tensor) and bool((positions.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "position_ids begin again within a row: texts that are packed without padding are not "
            "supported by adaskip_fx yet; pad them, or call the original model"
        )


def _refuse_unsupported(model: Any, given: dict[str, Any]) -> None:
    _refuse_outputs(model)
    if model.training:
        raise RuntimeError("a compiled model is for inference only; call eval() on it")
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            "gradients cannot flow through a compiled model; wrap the call in torch.no_grad() or "
            "torch.inference_mode()"
        )
    for name, value in given.items():
        if name not in _STEP_ARGUMENTS and value is not None and value is not False:
            raise NotImplementedError(
                f"forward({name}=...) is not supported by adaskip_fx yet; call the original model"
            )
    if isinstance(given.get("logits_to_keep"), torch.Tensor):
        raise NotImplementedError("logits_to_keep must be an integer, not a tensor of indices")


def _checked_ids(model: Any, input_ids: Any) -> torch.Tensor:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise ValueError("input_ids must be a tensor [batch, tokens]")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids is empty: {list(input_ids.shape)}")
    if torch._C._functorch.is_functorch_wrapped_tensor(input_ids):
        raise NotImplementedError(
            "transforms of torch.func (vmap, grad) are not supported by adaskip_fx yet; a captured "
            "graph cannot be transformed"
        )
    device = model._adaskip.device
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}, the model on {device}")
    return input_ids.to(torch.int64).contiguous()


def _checked_mask(mask: Any, input_ids: torch.Tensor, cache: SkipCache) -> torch.Tensor | None:
    """The mask [batch, stored + new], or None when nothing is padded.

    Models without attention are given one of the new tokens alone, as ``generate`` makes it.
    """
    past = cache.length
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise NotImplementedError(
            "attention_mask must be a tensor [batch, tokens]; prepared 4D masks are not supported"
        )
    expected = (input_ids.shape[0], past + input_ids.shape[1])
    if mask.shape == input_ids.shape and not any(slot.attends for slot in cache.slots):
        mask = torch.nn.functional.pad(mask, (past, 0), value=1)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected {list(expected)}: "
            f"{past} stored and {input_ids.shape[1]} new tokens"
        )
    return None if bool((mask != 0).all()) else mask.to(input_ids.device)


def _checked_positions(positions: Any, input_ids: torch.Tensor) -> torch.Tensor | None:
    if positions is None:
        return None
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        raise NotImplementedError(
            "position_ids must be a tensor [batch, tokens]; more axes are not supported"
        )
    return positions.to(input_ids.device)


def _stop_tokens(generation_config: Any) -> torch.Tensor | None:
    """Ids after which generate feeds a row with padding only."""
    known = [
        t
        for t in (generation_config._eos_token_tensor, generation_config._pad_token_tensor)
        if t is not None
    ]
    return torch.cat([t.reshape(-1) for t in known]) if known else None
