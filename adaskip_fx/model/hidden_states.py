"""The hidden states of a call that asks for them: those of what runs under the plan.

transformers means by them what enters the first layer, what each layer makes, and of the last one
what the head reads. Here they are the residual stream between layers. That both are the same is
seen once for a model: it is run on a few tokens, in a copy of its modules, because transformers
leaves hooks on those that it is asked for hidden states of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from adaskip_passes._torch import one_at_a_time

from ..capture.check_graph import relative_error
from ..capture.state import State
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import SkipPlan
from ..programs.instruments import HiddenStateRecorder, Instrument

if TYPE_CHECKING:
    from ..runtime.runtime import Runtime
    from .types import CompiledCausalLM

_proven: WeakSet[State] = WeakSet()


@contextmanager
def recording(cache: SkipCache, recorder: Instrument | None) -> Iterator[None]:
    """Meanwhile the programs of a request record; None for what they do anyway."""
    before = cache.request.instrument
    cache.request.instrument = recorder or before
    try:
        yield
    finally:  # a step may have begun another turn
        cache.request.instrument = before


def check_hidden_states(model: CompiledCausalLM) -> None:
    """Refuse a model whose hidden states are something else than its stream between layers.

    Args:
        model: a compiled model.

    Raises:
        NotImplementedError: they are.
    """
    state = model._adaskip.graphs.states.look()
    if state in _proven:
        return
    if not _are_own(model, state):
        raise NotImplementedError(
            f"{type(model).__name__} gives no hidden states, or others than its residual stream "
            "between layers, so forward(output_hidden_states=...) is not supported by adaskip_fx "
            "yet; call the original model"
        )
    _proven.add(state)


@torch.no_grad()
def _are_own(model: CompiledCausalLM, state: State) -> bool:
    """Return whether the user's own forward gives the hidden states that a full program records."""
    runtime = model._adaskip
    ids = state.reference.steps["prefill"][0].ids[:1].to(runtime.device)
    with torch.autocast(runtime.device.type, enabled=False):
        theirs = _of_a_copy(model, state, ids)
        mine = _recorded(runtime, ids)
    if theirs is None or [t.shape for t in theirs] != [t.shape for t in mine]:
        return False
    errors = [relative_error(a, b) for a, b in zip(mine, theirs, strict=True)]
    return max(errors) <= state.reference.tolerance


def eager_twin(model: CompiledCausalLM) -> Any | None:
    """Return a model of the user's class, of copied modules that share a compiled model's tensors.

    None where something of the user's own cannot be copied.
    """
    base = type(model._adaskip.graphs.states.original)
    twin: Any = object.__new__(base)
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo[id(model)] = twin
    held = {name: value for name, value in vars(model).items() if name != "_adaskip"}
    with one_at_a_time:  # modules are marked while they are traced
        try:
            vars(twin).update(copy.deepcopy(held, memo))
        except TypeError:
            return None
    return twin


def _of_a_copy(
    model: CompiledCausalLM, state: State, ids: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """Return what the user's forward gives on a copy of the modules that shares their tensors."""
    twin = eager_twin(model)
    if twin is None:
        return None
    with state.reference.implementations_of(twin):
        output = type(twin).forward(
            twin, input_ids=ids, output_hidden_states=True, return_dict=True
        )
    states: tuple[torch.Tensor, ...] | None = getattr(output, "hidden_states", None)
    return states or None


def _recorded(runtime: Runtime, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the hidden states that a program of the full model records, unseen by the observer."""
    recorder = HiddenStateRecorder()
    plan = SkipPlan.empty(runtime.sublayers)
    cache = runtime.new_cache(plan=plan, instrument=recorder)
    observer, runtime.observer = runtime.observer, None
    try:
        runtime.step(ids, None, None, cache, 1)
    finally:
        runtime.observer = observer
    return recorder.states
