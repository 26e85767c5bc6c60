"""The forward of a compiled model: its arguments are checked, and the runtime runs the step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..capture.arguments import by_name, forward_names
from ..kv_cache.adopt_cache import own_cache
from ..kv_cache.argument_names import CACHE_NAMES, under_one_name
from ..kv_cache.cache import SkipCache
from ..programs.instruments import HiddenStateRecorder
from ..runtime.kept_logits import cut
from ..utils.transformers_types import ModelConfig
from .checked_arguments import (
    checked_keep,
    checked_mask,
    checked_positions,
    checked_tokens,
)
from .checked_call import check_call, not_supported
from .hidden_states import check_hidden_states, recording
from .host import Reached, through_host
from .loss import check_loss, loss_arguments, loss_of
from .outputs import image_output, model_output
from .packed_texts import PackedTexts, packed_texts
from .router_logits import RouterRecorder, routed_output, router_values, without_routers

if TYPE_CHECKING:
    from .types import CompiledCausalLM

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
#: They are looked at one by one.
_OF_ALL = frozenset(
    {
        *("inputs_embeds", "labels", "num_items_in_batch"),
        *("output_hidden_states", "output_attentions", "output_router_logits"),
    }
)


def compiled_forward(base: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a compiled model, with the signature of the original one, `base`."""
    signature = inspect.signature(base)
    own = {n: p.kind for n, p in signature.parameters.items() if n != "self"}
    named = frozenset(n for n, kind in own.items() if kind is not inspect.Parameter.VAR_KEYWORD)
    takes_any = len(named) < len(own)

    @functools.wraps(base)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and (
            takes_any or named.issuperset(kwargs)
        ):  # as `generate` calls it; binding takes longer
            return _run(self, kwargs)
        given = by_name(signature, (self, *args), kwargs)
        given.pop("self")
        return _run(self, given)

    return forward


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="a model compiled by adaskip_fx has graphs of its own"
)
def _run(model: CompiledCausalLM, arguments: dict[str, Any]) -> Any:
    """Run one forward of the compiled model."""
    runtime, config = model._adaskip, model.config
    arguments = under_one_name(arguments, runtime.cache_argument)
    cache = arguments.get(runtime.cache_argument)
    filled = cache if isinstance(cache, SkipCache) and cache.length else None
    reached = Reached(arguments, None)
    if runtime.decoder_path:
        offsets = filled.request.offsets if filled is not None else None
        reached = through_host(model, arguments, _STEP_ARGUMENTS | _OF_ALL, offsets)
        arguments = reached.arguments
    call, arguments = arguments, without_routers(arguments)
    # Most models return a cache that they fill.
    returns_cache = cache is not None or _flag(arguments, "use_cache", config)
    for_loss = _refuse_unsupported(model, arguments, goes_on=filled is not None)
    device = filled.device if filled is not None else runtime.device
    given = arguments.get("input_ids"), arguments.get("inputs_embeds")
    input_ids = checked_tokens(model, device, *given)
    alone = arguments.get("attention_mask") is None and not returns_cache
    texts = (
        packed_texts(model, arguments.get("position_ids"), input_ids.shape[:2]) if alone else None
    )
    cache = own_cache(cache if cache is not None else runtime.new_cache(), runtime)
    cache.request.offsets = reached.offsets
    if call is not arguments:
        return _run_routed(model, call, arguments, input_ids, cache, texts, returns_cache)
    recorder = HiddenStateRecorder() if arguments.get("output_hidden_states") is True else None
    with recording(cache, recorder):
        if texts is not None:
            logits, loss = _run_texts(model, arguments, input_ids, cache, texts, for_loss)
        else:
            logits, loss = _run_step(model, arguments, input_ids, cache, for_loss)
    states = recorder.states if recorder is not None else None
    output = model_output(
        runtime.cache_argument,
        loss=loss,
        logits=logits,
        cache=cache if returns_cache else None,
        hidden_states=tuple(map(texts.row, states)) if states and texts is not None else states,
        kind=_output_kind(model),
        of_images=reached.of_images,
    )
    return output if _flag(arguments, "return_dict", config) else output.to_tuple()


def _output_kind(model: CompiledCausalLM) -> type[ModelOutput]:
    original = type(model._adaskip.graphs.states.original)
    around = image_output(original.forward) if model._adaskip.decoder_path else None
    return around or CausalLMOutputWithPast


def _run_step(
    model: CompiledCausalLM,
    arguments: Mapping[str, Any],
    input_ids: torch.Tensor,
    cache: SkipCache,
    for_loss: dict[str, Any] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a step on a cache of the model's own; returns logits, and the loss of labels."""
    runtime, mask = model._adaskip, arguments.get("attention_mask")
    in_axes = bool(runtime.decoder_path)
    positions = checked_positions(arguments.get("position_ids"), input_ids, in_axes)
    keep = checked_keep(arguments.get("logits_to_keep"), input_ids, runtime.graphs.forward)
    ahead = mask is not None and input_ids.shape[1] == 1 and runtime.may_suppose(cache)
    before, padded = cache.length, cache.padded
    request = cache.request.copy() if for_loss is not None else None

    def take_back() -> None:
        cache.keep_first(before)
        cache.padded = padded

    read, padding, supposed = checked_mask(mask, input_ids, cache, ahead and for_loss is None)
    if for_loss is not None:
        padding = None  # the padding's own logits count: the last ones say what the first token is
    logits = runtime.step(input_ids, read, positions, cache, keep, padding)
    if supposed is not None and not supposed:  # found while the step was on its way
        take_back()
        read, padding, _ = checked_mask(mask, input_ids, cache, False)
        logits = runtime.step(input_ids, read, positions, cache, keep, padding)
    if for_loss is None:
        return logits, None
    try:
        return logits, loss_of(model, logits, arguments["labels"], for_loss)
    except Exception:
        if not cache.stateful:  # (a mixer's state cannot be taken back)
            take_back()
            cache.request = request  # and what was learned of the step, or chosen by it
        raise


def _run_routed(
    model: CompiledCausalLM,
    call: Mapping[str, Any],
    arguments: Mapping[str, Any],
    tokens: torch.Tensor,
    cache: SkipCache,
    texts: PackedTexts | None,
    returns_cache: bool,
) -> Any:
    """Run a `call` that asks for router logits; `arguments` are those that have no part in that."""
    recorder = RouterRecorder(router_values(model))
    if texts is not None or arguments.get("output_hidden_states"):
        raise NotImplementedError(
            "forward(output_router_logits=...) of packed texts, or with hidden states, is not "
            "supported by adaskip_fx yet; call the original model"
        )
    with recording(cache, recorder):
        logits, _ = _run_step(model, arguments, tokens, cache, None)
    held = cache if returns_cache else None
    return routed_output(model, call, logits, held, recorder.values)


def _run_texts(
    model: CompiledCausalLM,
    arguments: Mapping[str, Any],
    tokens: torch.Tensor,
    cache: SkipCache,
    texts: PackedTexts,
    for_loss: dict[str, Any] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run packed texts as a batch; returns logits as of the rows they came in, and the loss."""
    keep = checked_keep(arguments.get("logits_to_keep"), tokens, model._adaskip.graphs.forward)
    batch = texts.batch(tokens)
    positions = texts.batch(arguments["position_ids"].expand(tokens.shape[:2]))
    mask, padding, _ = checked_mask(texts.mask, batch, cache, False)
    cache.for_one_call = True
    logits = cut(texts.row(model._adaskip.step(batch, mask, positions, cache, 0, padding)), keep)
    if for_loss is None:
        return logits, None
    return logits, loss_of(model, logits, arguments["labels"], for_loss)


def _flag(arguments: Mapping[str, Any], name: str, config: ModelConfig) -> bool:
    """Return a flag of forward, which the config decides where the caller does not."""
    value = arguments.get(name)
    return bool(getattr(config, name, True) if value is None else value)


def _refuse_unsupported(
    model: CompiledCausalLM, arguments: Mapping[str, Any], goes_on: bool
) -> dict[str, Any] | None:
    """Refuse what there is no graph for; a request that `goes_on` keeps to the config it had.

    Returns:
        What is for the loss function besides the labels; None where there are no labels.
    """
    check_call(model, arguments.get("inputs_embeds"), goes_on)
    more = {
        name: value
        for name, value in arguments.items()
        if name not in _STEP_ARGUMENTS and value is not None and value is not False
    }
    if "inputs_embeds" in forward_names(type(model).forward):
        more.pop("inputs_embeds", None)
    if more.get("output_hidden_states") is True:
        del more["output_hidden_states"]
        check_hidden_states(model)
    labels = more.pop("labels", None) if "labels" in forward_names(type(model).forward) else None
    of_loss = loss_arguments(model.loss_function) if more or labels is not None else frozenset()
    for name in more:
        if name not in of_loss:
            raise not_supported(name)
    if labels is None:
        return None
    check_loss(model, labels, more)
    return more
