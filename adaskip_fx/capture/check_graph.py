"""Whether a captured graph gives the logits that the user's model gave on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaskip_passes import UnsupportedError

from ..kv_cache.buffers import CacheBuffers
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.packed_view import PackedCacheView
from ..kv_cache.step_views import step_view
from ..kv_cache.views import DynamicCacheView, StaticCacheView
from .arguments import (
    AnyCacheView,
    Forward,
    bind_arguments,
    forward_names,
    step_inputs,
    takes_indices,
)
from .graph_key import GraphKey
from .phase_graph import CapturedPhase
from .reference import ReferenceRun, ReferenceStep

#: Tokens that buffers have room for beyond those of a step, as they do while serving.
_ROOM = 9
#: Tokens of padding that a graph is tried with.
_PADDING = 3
#: Tokens that the second of two packed rows has less.
_PACKED_LESS = 2


@torch.no_grad()
def check_graph(
    reference: ReferenceRun, captured: CapturedPhase, model: Any, forward: Forward
) -> None:
    """Compare what a captured graph gives, as it came, with what the user's model gave.

    Graphs that are right only for other lengths, or for an autocast region, are not checked.

    Args:
        reference: what the user's model gave.
        captured: a phase of the compiled model.
        model: the compiled model.
        forward: the function that was traced.

    Raises:
        UnsupportedError: the logits are others.
    """
    key = captured.key
    if key.surroundings.autocast or key.one_stored or key.dtype != reference.dtype:
        return
    for step in _steps(reference, key):
        if step.logits.device != key.device or not step.usable:
            continue
        if key.packed:
            _compare_packed(reference, step, captured, model, forward)
            continue
        for batch in key.batch.checked(captured.rows)[: 1 if step.long else None]:
            _compare(reference, step, captured, model, forward, batch)


def is_right_for_padding(
    reference: ReferenceRun, captured: CapturedPhase, model: Any, forward: Forward
) -> bool:
    """Return whether a graph for a static cache gives the same logits after padding.

    Args:
        reference: what the user's model gave, without padding.
        captured: a phase of the compiled model, on a static cache.
        model: the compiled model.
        forward: the function that was traced.
    """
    key = captured.key
    usable = [s for s in _steps(reference, key) if s.logits.device == key.device and s.usable]
    if (
        key.whole
        or not usable
        or key.dtype != reference.dtype
        or "position_ids" not in forward_names(forward)
    ):
        return False
    try:
        for step in usable:
            _compare(reference, step, captured, model, forward, captured.rows, _PADDING)
    except UnsupportedError:
        return False
    return True


def _steps(reference: ReferenceRun, key: GraphKey) -> tuple[ReferenceStep, ...]:
    return reference.steps["decode" if key.one_token else key.phase]


def _compare(
    reference: ReferenceRun,
    step: ReferenceStep,
    captured: CapturedPhase,
    model: Any,
    forward: Forward,
    batch: int,
    padding: int = 0,
) -> None:
    key, available = captured.key, step.ids.shape[0]
    name = f"{key.phase} on a static cache" if key.static_cache else key.phase
    errors = []
    for first in range(available):
        rows = torch.arange(first, first + batch, device=key.device) % available
        cache = _cache_after(step, reference.specs, rows, key, padding)
        arguments = _arguments(key, model, forward, step, rows, cache)
        if not captured.guards().hold(arguments):
            return
        logits = _run(captured, arguments, name)
        if key.static_tokens:  # the rest is no token
            logits = logits[:, : step.ids.shape[1]]
        kept = min(logits.shape[1], step.logits.shape[1])
        backwards = isinstance(arguments["inputs"].get("logits_to_keep"), torch.Tensor)
        expected = (step.logits.flip(1) if backwards else step.logits)[rows][:, -kept:]
        errors.append(relative_error(logits[:, -kept:], expected, median=step.long))
        if errors[-1] <= reference.tolerance:  # (a router's choice may flip in one of the rows)
            return
    raise UnsupportedError(
        f"the graph captured for {name} gives other logits than the model: on "
        f"{step.ids.shape[1]} token(s) after {step.past} they differ by {min(errors):.1e} of "
        "the largest. The model's code depends on something that was not captured (its cache's "
        "type, its attention implementation)."
    )


def _compare_packed(
    reference: ReferenceRun,
    step: ReferenceStep,
    captured: CapturedPhase,
    model: Any,
    forward: Forward,
) -> None:
    """Compare a packed prompt of one row and the beginning of another, from back to front."""
    key, device = captured.key, captured.key.device
    rows, tokens = step.ids.shape
    if rows < 2 or step.logits.shape[1] < tokens:
        return
    short = tokens - _PACKED_LESS
    slots = [2 * t for t in range(tokens)] + [2 * (t + _PACKED_LESS) + 1 for t in range(short)]
    form = key.dtype, device
    buffers = CacheBuffers.new(reference.specs, 2, tokens, *form, by_head=key.by_head)
    offsets = torch.tensor([0, tokens, tokens + short], dtype=torch.int32, device="cpu")
    places = torch.tensor(slots, device=device)
    cache = PackedCacheView.of(buffers, reference.specs, tokens, places, offsets)
    order = torch.arange(tokens, device=device)
    inputs = step_inputs(
        forward,
        _given(key, model, torch.cat((step.ids[0], step.ids[1, :short])).unsqueeze(0)),
        torch.cat((order, order[:short])).unsqueeze(0),
        None,
        1 if key.last_logits else torch.arange(tokens + short, device=device).flip(0),
    )
    arguments = bind_arguments(model, forward, cache, inputs)
    if not captured.guards().hold(arguments):
        return
    expected = torch.cat((step.logits[0], step.logits[1, :short])).unsqueeze(0)
    if takes_indices(forward):  # else all come, in order
        expected = expected.flip(1)
    if key.last_logits:
        expected = expected[:, :1]
    error = relative_error(_run(captured, arguments, "packed prompts"), expected)
    if error > reference.tolerance:
        raise UnsupportedError(
            f"the graph captured for packed prompts gives other logits than the model: they differ "
            f"by {error:.1e} of the largest. The model's code does not tell packed rows apart."
        )


def _cache_after(
    step: ReferenceStep,
    specs: tuple[LayerCacheSpec, ...],
    rows: torch.Tensor,
    key: GraphKey,
    padding: int,
) -> DynamicCacheView | StaticCacheView:
    """Return a cache with what was stored before a step, of some rows, as the graph sees it.

    On a static cache rows begin with `padding` tokens that are none.
    """
    new = max(step.ids.shape[1], key.static_tokens)
    total, dtype = step.past + new, key.dtype
    room = total + padding + _ROOM
    buffers = CacheBuffers.new(
        specs, len(rows), room, dtype, key.device, whole=key.whole, by_head=key.by_head
    )
    for i, (keys, values, states) in enumerate(step.memory):
        pairs = [(buffers.keys[i], keys), (buffers.values[i], values)]
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                mine[:, :, padding : padding + step.past] = theirs[rows]
        for mine, theirs in zip(buffers.states[i], states, strict=False):
            mine.copy_(theirs[rows])
    if key.static_cache:
        first = torch.full((len(rows),), padding, dtype=torch.int64, device=key.device)
        return StaticCacheView.of(buffers, specs, first + step.past, first, key.whole)
    return step_view(buffers, specs, total, new, key.phase == "prefill")


def _arguments(
    key: GraphKey,
    model: Any,
    forward: Forward,
    step: ReferenceStep,
    rows: torch.Tensor,
    cache: AnyCacheView,
) -> dict[str, Any]:
    new = max(step.ids.shape[1], key.static_tokens)
    total = step.past + new
    # From the last token to the first, so that a graph that takes no heed of it is found out.
    backwards = torch.arange(new - step.logits.shape[1], new, device=key.device).flip(0)
    positions = torch.arange(step.past, total, device=key.device)
    positions = positions.clamp_max(step.past + step.ids.shape[1] - 1)
    axes = (key.axes,) if key.axes else ()
    positions = positions.expand(*axes, len(rows), new)
    mask = torch.ones(len(rows), total, dtype=torch.bool, device=key.device)
    ids = torch.nn.functional.pad(step.ids[rows], (0, new - step.ids.shape[1]))
    inputs = step_inputs(
        forward,
        _given(key, model, ids.contiguous()),
        positions.contiguous(),
        mask if key.masked else None,
        int(key.last_logits) if key.last_logits or key.static_tokens else backwards,
    )
    return bind_arguments(model, forward, cache, inputs)


def _given(key: GraphKey, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return ids as a graph takes them: by their embeddings, or as they are."""
    embedded: torch.Tensor = model.get_input_embeddings()(ids) if key.embedded else ids
    return embedded


def _run(captured: CapturedPhase, arguments: dict[str, Any], name: str) -> torch.Tensor:
    """Return the logits of the captured graph, run node by node."""
    graph = captured.capture.graph
    values = (*captured.weights(arguments), *captured.bind_step(arguments))
    placeholders = graph.graph.find_nodes(op="placeholder")
    inputs = (values[captured.input_index[node.name]] for node in placeholders)
    try:
        logits: torch.Tensor = fx.Interpreter(graph, garbage_collect_values=True).run(*inputs)[0]
    except RuntimeError as error:  # an assertion about values that was captured
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"the graph captured for {name} does not run: {reason}") from error
    return logits


def relative_error(got: torch.Tensor, want: torch.Tensor, median: bool = False) -> float:
    """Return the largest difference, in units of the largest expected value; infinite for NaN.

    Args:
        got: logits [B, T, V].
        want: the expected logits [B, T, V].
        median: take the median of all tokens' largest differences, because among many tokens a
            router's choice may flip for one.
    """
    each = (got.double() - want.double()).abs().flatten(2).amax(2)
    error = (each.median() if median else each.max()) / want.double().abs().max().clamp_min(1e-30)
    return float("inf") if bool(error.isnan()) else float(error)
