"""The forward of a compiled model: its arguments are checked, and the runtime runs the step."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..capture.arguments import Forward, takes_logits_to_keep
from ..kv_cache.adopt_cache import own_cache
from ..kv_cache.argument_names import CACHE_NAMES, output_fields, under_one_name
from ..kv_cache.cache import SkipCache
from ..kv_cache.padding import Answer, Padding
from ..utils.torch_internals import is_transformed
from ..utils.transformers_types import ModelConfig
from .check_model import refuse_outputs

if TYPE_CHECKING:
    from .types import CompiledCausalLM

logger = logging.getLogger(__name__)

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


@dataclass
class StatefulOutput(ModelOutput):  # type: ignore[misc]  # transformers is not typed
    """The output of models that call their cache ``cache_params`` (Mamba).

    Attributes:
        logits: [B, kept, V].
        cache_params: the request's cache.
    """

    logits: torch.Tensor | None = None
    cache_params: SkipCache | None = None


def compiled_forward(base: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a compiled model, with the signature of the original one, `base`."""
    signature = inspect.signature(base)
    named = frozenset(signature.parameters) - {"self", "kwargs"}

    @functools.wraps(base)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and named.issuperset(kwargs):  # as `generate` calls it; binding takes longer
            return _run(self, kwargs)
        bound = signature.bind(self, *args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        bound.pop("self")
        return _run(self, {**bound, **extra})

    return forward


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="a model compiled by adaskip_fx has graphs of its own"
)
def _run(model: CompiledCausalLM, arguments: dict[str, Any]) -> Any:
    """Run one forward of the compiled model."""
    runtime, config = model._adaskip, model.config
    arguments = under_one_name(arguments, runtime.cache_argument)
    cache = arguments.get(runtime.cache_argument)
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    # Most models return a cache that they fill.
    returns_cache = cache is not None or _flag(arguments, "use_cache", config)
    filled = cache if isinstance(cache, SkipCache) and cache.length else None
    _refuse_unsupported(model, arguments, goes_on=filled is not None)
    device = filled.device if filled is not None else runtime.device
    input_ids = _checked_ids(device, arguments.get("input_ids"))
    if cache is None:
        if mask is None and not returns_cache:
            _refuse_packed(positions)
        cache = runtime.new_cache()
    cache = own_cache(cache, runtime)
    positions = _checked_positions(positions, input_ids)
    keep = _checked_keep(arguments.get("logits_to_keep"), input_ids, runtime.graphs.forward)
    ahead = mask is not None and input_ids.shape[1] == 1 and runtime.may_suppose(cache)
    before, padded = cache.length, cache.padded
    read, padding, supposed = _checked_mask(mask, input_ids, cache, ahead)
    logits = runtime.step(input_ids, read, positions, cache, keep, padding)
    if supposed is not None and not supposed:  # found while the step was on its way
        cache.keep_first(before)
        cache.padded = padded
        read, padding, _ = _checked_mask(mask, input_ids, cache, False)
        logits = runtime.step(input_ids, read, positions, cache, keep, padding)
    kept = cache if returns_cache else None
    if not _flag(arguments, "return_dict", config):
        return (logits, kept) if kept is not None else (logits,)
    if runtime.cache_argument == "cache_params":
        return StatefulOutput(logits=logits, cache_params=kept)
    return CausalLMOutputWithPast(logits=logits, **output_fields(CausalLMOutputWithPast, kept))


def _flag(arguments: Mapping[str, Any], name: str, config: ModelConfig) -> bool:
    """Return a flag of forward, which the config decides where the caller does not."""
    value = arguments.get(name)
    return bool(getattr(config, name, True) if value is None else value)


def _refuse_packed(positions: object) -> None:
    """Refuse positions of several texts in a row, which a model tells apart without a cache."""
    if isinstance(positions, torch.Tensor) and bool((positions.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "position_ids begin again within a row: texts that are packed without padding are not "
            "supported by adaskip_fx yet; pad them, or call the original model"
        )


def _refuse_unsupported(
    model: CompiledCausalLM, arguments: Mapping[str, Any], goes_on: bool
) -> None:
    """Refuse what there is no graph for; a request that `goes_on` keeps to the config it had."""
    if not goes_on:
        refuse_outputs(model)
    if model.training:
        raise RuntimeError("a compiled model is for inference only; call eval() on it")
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(
            "gradients cannot flow through a compiled model; wrap the call in torch.no_grad() or "
            "torch.inference_mode()"
        )
    for name, value in arguments.items():
        if name not in _STEP_ARGUMENTS and value is not None and value is not False:
            raise NotImplementedError(
                f"forward({name}=...) is not supported by adaskip_fx yet; call the original model"
            )


def _checked_ids(device: torch.device, input_ids: object) -> torch.Tensor:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise ValueError("input_ids must be a tensor [batch, tokens]")
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids is empty: {list(input_ids.shape)}")
    if is_transformed(input_ids):
        raise NotImplementedError(
            "transforms of torch.func (vmap, grad) are not supported by adaskip_fx yet; a captured "
            "graph cannot be transformed"
        )
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}, the model on {device}")
    return input_ids.to(torch.int64).contiguous()


def _checked_mask(
    mask: object, input_ids: torch.Tensor, cache: SkipCache, ahead: bool
) -> tuple[torch.Tensor | None, Padding | None, Answer | None]:
    """Return the mask [batch, stored + new], or None when nothing is padded, and what it says.

    Models without attention get one of the new tokens alone, as ``generate`` makes it. If a step
    may be begun `ahead`, that is what the last mask said, and the third is whether it is right.
    """
    past = cache.length
    if mask is None:
        return None, None, None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise NotImplementedError(
            "attention_mask must be a tensor [batch, tokens]; prepared 4D masks are not supported"
        )
    expected = (input_ids.shape[0], past + input_ids.shape[1])
    if mask.shape == input_ids.shape and not any(spec.attends for spec in cache.specs):
        mask = torch.nn.functional.pad(mask, (past, 0), value=1)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected {list(expected)}: "
            f"{past} stored and {input_ids.shape[1]} new tokens"
        )
    mask = mask.to(input_ids.device)
    padding, same = cache.mask.padding(mask, suppose=ahead)
    if padding is None:
        _say_once()
    elif not padding.any:
        return None, None, same
    return mask, padding, same


@functools.cache
def _say_once() -> None:
    logger.warning(
        "rows of this batch are padded on the right, or have holes; they run with a mask, which is "
        "slower than padding on the left"
    )


def _checked_positions(positions: object, input_ids: torch.Tensor) -> torch.Tensor | None:
    if positions is None:
        return None
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        raise NotImplementedError(
            "position_ids must be a tensor [batch, tokens]; more axes are not supported"
        )
    return positions.to(input_ids.device)


def _checked_keep(keep: Any, input_ids: torch.Tensor, forward: Forward) -> int | torch.Tensor:
    """Return how many last tokens' logits are wanted, 0 for all; or whose, int64 [K]."""
    tokens, device = input_ids.shape[1], input_ids.device
    if not isinstance(keep, torch.Tensor):
        count = int(keep or 0)  # below zero: without so many of the first, as in the eager model
        return count if count >= 0 else torch.arange(min(-count, tokens), tokens, device=device)
    if not takes_logits_to_keep(forward):
        return 0
    indices: torch.Tensor = keep
    if keep.dim() != 1 or keep.dtype not in (torch.int64, torch.int32, torch.bool):
        raise NotImplementedError(
            "logits_to_keep must be an integer, indices [kept] or a bool mask [tokens], not "
            f"{str(keep.dtype).removeprefix('torch.')} {list(keep.shape)}; call the original model"
        )
    if keep.dtype == torch.bool:
        if keep.shape[0] != tokens:
            raise IndexError(
                f"logits_to_keep is a mask of {keep.shape[0]} token(s), but {tokens} are new"
            )
        indices = keep.nonzero().flatten()
    elif keep.device.type == "cpu" and bool(((keep < -tokens) | (keep >= tokens)).any()):
        raise IndexError(
            f"logits_to_keep names a token beyond the {tokens} new one(s): {keep.tolist()}"
        )
    return indices.to(device, torch.int64)
