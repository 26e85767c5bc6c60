"""The forward of a compiled model whose head gives no logits of tokens: a classifier, a reward.

What is compiled is the decoder; the head (its scores, which token they are of, its loss) is the
model's own code, which runs as it is on the hidden states that the decoder's programs give.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from adaskip_passes import UnsupportedError

from ..capture.arguments import by_name
from ..capture.check_graph import relative_error
from ..capture.traced_part import decoder_name
from ..kv_cache.argument_names import CACHE_NAMES
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import SkipPlan
from ..programs.instruments import HiddenStateRecorder
from .checked_arguments import checked_mask, checked_positions, checked_tokens, refuse_packed
from .checked_call import check_call, not_supported
from .hidden_states import check_hidden_states, recording
from .stand_in import with_stand_in

if TYPE_CHECKING:
    from .types import CompiledCausalLM

#: What a loss is made of.
_LABELS = ("labels", "start_positions", "end_positions")

_SAME = 1e-4  # what other kernels may differ by, where nothing else does

_TAKEN = frozenset(
    {
        *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache"),
        *("return_dict", "output_hidden_states", "cache_position"),
    }
)


def headed_forward(base: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a compiled model with such a head, of the original one, `base`."""

    @functools.wraps(base)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, None, args, kwargs)

    return forward


@torch.no_grad()
def check_causal(model: Any, ids: torch.Tensor) -> None:
    """Refuse a model whose tokens see those after them.

    Args:
        model: the user's, with a head that gives no logits.
        ids: of a text, int64 [1, T].

    Raises:
        TypeError: it is an encoder.
    """
    name = decoder_name(model)
    assert name is not None
    other = ids[:, :1].expand_as(ids)
    first = [getattr(model, name)(input_ids=text)[0][:, :1] for text in (ids, other)]
    if relative_error(first[1], first[0]) > _SAME:
        raise TypeError(
            f"{type(model).__name__} is an encoder: its tokens see those after them; only "
            "decoder-only models are supported"
        )


@torch.no_grad()
def check_head(model: CompiledCausalLM) -> None:
    """Refuse a model whose head makes of the decoder's hidden states what the model does not.

    Args:
        model: a compiled model.

    Raises:
        UnsupportedError: its head reads something else.
    """
    runtime = model._adaskip
    state, original = runtime.graphs.states.current, runtime.graphs.states.original
    ids = state.reference.steps["prefill"][0].ids[:1]
    name = type(original).__name__
    try:
        theirs = original(input_ids=ids, return_dict=True)
        mine = _run(model, SkipPlan.empty(runtime.sublayers), (), {"input_ids": ids})
        errors = [relative_error(_tokens(a), _tokens(b)) for a, b in _pairs(mine, theirs)]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise UnsupportedError(
            f"the head of {name} does not run on its decoder's hidden states: {error}"
        ) from error
    if not errors or max(errors) > state.reference.tolerance:
        raise UnsupportedError(
            f"the head of {name} does not give what the model gives when it is handed the hidden "
            "states of its decoder alone"
        )


def _pairs(mine: Any, theirs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the tensors of two outputs, field by field."""
    return [(mine[k], v) for k, v in theirs.items() if isinstance(v, torch.Tensor)]


def _tokens(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(1, 1, -1)


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="a model compiled by adaskip_fx has graphs of its own"
)
def _run(
    model: CompiledCausalLM,
    plan: SkipPlan | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run the head's own code on what the decoder's programs give; `plan` is the request's."""
    runtime = model._adaskip
    original = runtime.graphs.states.original
    name = decoder_name(original)
    assert name is not None
    signature = inspect.signature(runtime.graphs.forward)
    check_call(model, None, goes_on=False)
    runtime.graphs.states.look()  # the head runs as it is, with adapters that came since

    def decoder(*args: Any, **kwargs: Any) -> Any:
        return _decode(model, plan, by_name(signature, (None, *args), kwargs), in_loss)

    base = type(original)
    given = by_name(inspect.signature(base.forward), (model, *args), kwargs)
    if given.get("use_cache") is True:
        _refuse_cache("use_cache")
    in_loss = any(given.get(name) is not None for name in _LABELS)
    with torch.no_grad():
        return base.forward(with_stand_in(model, base, [name], decoder), *args, **kwargs)


def _decode(
    model: CompiledCausalLM, plan: SkipPlan | None, arguments: dict[str, Any], in_loss: bool
) -> Any:
    """Return what the decoder gives of one prompt, which nothing is kept of."""
    runtime = model._adaskip
    _refuse_others(arguments)
    given = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = checked_tokens(model, runtime.device, *given)
    if arguments.get("attention_mask") is None:
        refuse_packed(arguments.get("position_ids"))
    cache: SkipCache = runtime.new_cache(plan=plan)
    positions = checked_positions(arguments.get("position_ids"), tokens)
    read, padding, _ = checked_mask(arguments.get("attention_mask"), tokens, cache, False)
    if in_loss:
        padding = None  # the padding's own hidden states count
    recorder: HiddenStateRecorder | None = None
    if arguments.get("output_hidden_states"):
        check_hidden_states(model)
        recorder = HiddenStateRecorder()
    with recording(cache, recorder):
        last = runtime.step(tokens, read, positions, cache, 0, padding)
    states = recorder.states if recorder is not None else None
    output = BaseModelOutputWithPast(last_hidden_state=last, hidden_states=states)
    return output.to_tuple() if arguments.get("return_dict") is False else output


def _refuse_others(arguments: Mapping[str, Any]) -> None:
    """Refuse a cache, and what there is no graph for."""
    for name, value in arguments.items():
        if value is None or value is False or name in _TAKEN:
            continue
        if name in CACHE_NAMES:
            _refuse_cache(name)
        raise not_supported(name)


def _refuse_cache(name: str) -> NoReturn:
    raise NotImplementedError(
        f"forward({name}=...) of a model whose head gives no logits of tokens is not supported by "
        "adaskip_fx yet: it runs a text at once and returns no cache; pass all of the text"
    )
