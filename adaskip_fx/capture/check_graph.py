"""Whether a captured graph gives the logits that the user's model gave on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaskip_passes import UnsupportedError

from ..kv_cache.buffers import CacheBuffers
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.views import DynamicCacheView, LayerView, StaticCacheView
from .arguments import Forward, bind_arguments, step_inputs
from .graph_key import GraphKey
from .phase_graph import CapturedPhase
from .reference import ReferenceRun, ReferenceStep

#: Relative errors of the logits that other attention kernels may cause; a router's choice between
#: two experts may flip, so one of the rows is enough. Masks and positions that are wrong cost more.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 0.2
#: Tokens that buffers have room for beyond those of a step, as they do while serving.
_ROOM = 9


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
    for step in reference.steps["decode" if key.one_token else key.phase]:
        if step.logits.device == key.device and step.usable:
            _compare(reference, step, captured, model, forward)


def _compare(
    reference: ReferenceRun,
    step: ReferenceStep,
    captured: CapturedPhase,
    model: Any,
    forward: Forward,
) -> None:
    key, available = captured.key, step.ids.shape[0]
    name = f"{key.phase} on a static cache" if key.static_cache else key.phase
    errors = []
    for first in range(available):
        rows = torch.arange(first, first + key.batch, device=key.device) % available
        cache = _cache_after(step, reference.specs, rows, key)
        arguments = _arguments(key, model, forward, step, rows, cache)
        if not captured.guards().hold(arguments):
            return
        logits = _run(captured, arguments, name)
        kept = min(logits.shape[1], step.logits.shape[1])
        backwards = isinstance(arguments["inputs"].get("logits_to_keep"), torch.Tensor)
        expected = (step.logits.flip(1) if backwards else step.logits)[rows][:, -kept:]
        errors.append(relative_error(logits[:, -kept:], expected, median=step.long))
        if errors[-1] <= tolerance(reference.dtype):
            return
    raise UnsupportedError(
        f"the graph captured for {name} gives other logits than the model: on "
        f"{step.ids.shape[1]} token(s) after {step.past} they differ by {min(errors):.1e} of "
        "the largest. The model's code depends on something that was not captured (its cache's "
        "type, its attention implementation)."
    )


def _cache_after(
    step: ReferenceStep, specs: tuple[LayerCacheSpec, ...], rows: torch.Tensor, key: GraphKey
) -> DynamicCacheView | StaticCacheView:
    """Return a cache with what was stored before a step, of some rows, as the graph sees it."""
    new = step.ids.shape[1]
    total, dtype = step.past + new, key.dtype
    buffers = CacheBuffers.zeros(specs, key.batch, total + _ROOM, dtype, key.device)
    for i, (keys, values, states) in enumerate(step.memory):
        pairs = [(buffers.keys[i], keys), (buffers.values[i], values)]
        for mine, theirs in pairs:
            if mine is not None and theirs is not None:
                mine[:, :, : step.past] = theirs[rows]
        for mine, theirs in zip(buffers.states[i], states, strict=False):
            mine.copy_(theirs[rows])
    if key.static_cache:
        position = torch.full((1,), step.past, dtype=torch.int64, device=key.device)
        return StaticCacheView.of(buffers, specs, position, dtype)
    return _views(buffers, specs, total, new, prefill=key.phase == "prefill")


def _arguments(
    key: GraphKey,
    model: Any,
    forward: Forward,
    step: ReferenceStep,
    rows: torch.Tensor,
    cache: DynamicCacheView | StaticCacheView,
) -> dict[str, Any]:
    new = step.ids.shape[1]
    total = step.past + new
    # From the last token to the first, so that a graph that takes no heed of it is found out.
    backwards = torch.arange(new - step.logits.shape[1], new, device=key.device).flip(0)
    positions = torch.arange(step.past, total, device=key.device).expand(key.batch, new)
    mask = torch.ones(key.batch, total, dtype=torch.bool, device=key.device)
    inputs = step_inputs(
        forward,
        step.ids[rows].contiguous(),
        positions.contiguous(),
        mask if key.masked else None,
        1 if key.last_logits else backwards,
    )
    return bind_arguments(model, forward, cache, inputs)


def _views(
    buffers: CacheBuffers, specs: tuple[LayerCacheSpec, ...], total: int, new: int, prefill: bool
) -> DynamicCacheView:
    layers = []
    for i, spec in enumerate(specs):
        keys, values = (
            t.narrow(2, 0, total) if t is not None else None
            for t in (buffers.keys[i], buffers.values[i])
        )
        layers.append(LayerView(spec, keys, values, buffers.states[i]))
    filled, new_tokens = (buffers.lengths.narrow(0, 0, n) for n in (total, new))
    return DynamicCacheView(layers, filled, new_tokens, prefill)


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


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error of logits that other kernels may cause."""
    return _TOLERANCES.get(dtype, _HALF)


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
