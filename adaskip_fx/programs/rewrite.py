"""A plan becomes passes: actions a `Skip`, windows a `WindowAttention`; probes are a `Probe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from adaskip_passes import Probe, Replacement, Skip, run_passes
from adaskip_passes.infra.pass_base import Pass
from adaskip_passes.transforms.residue import Keep
from adaskip_passes.transforms.skip import surrogate_inputs
from adaskip_passes.windows.window_attention import WindowAttention, window_inputs

from ..plans.compose_surrogates import ComposedSurrogate, SurrogateTensors, compose_surrogates
from ..plans.skip_plan import Action, Phase, SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.windows import EVERYTHING, Window


def plan_phase(graph_phase: str) -> Phase:
    """Return the phase of a plan that a captured phase runs."""
    return "decode" if graph_phase == "decode" else "prefill"


def rewrite(
    outer: fx.GraphModule,
    sublayers: tuple[Sublayer, ...],
    plan: SkipPlan,
    phase: Phase,
    probed: tuple[Sublayer, ...] = (),
    *,
    keep: Keep = "nothing",
    probe_together: bool = False,
    first: Sequence[Pass] = (),
    surrogates: Mapping[Sublayer, ComposedSurrogate] | None = None,
) -> fx.GraphModule:
    """Return an outer graph under one phase of a plan.

    Args:
        outer: The graph as captured; it is not changed.
        sublayers: What its calls are, in stream order.
        plan: It decides what is skipped.
        phase: The phase of the plan.
        probed: The sublayers to measure.
        keep: Which effects of a skipped sublayer stay; see `adaskip_passes.Replacement`.
        probe_together: Whether one probe measures all; see `adaskip_passes.Probe`.
        first: The passes that run before the others.
        surrogates: What takes the place of sublayers that do not run; that of
            `compose_surrogates` if None.
    """
    put_in = compose_surrogates(plan, phase) if surrogates is None else surrogates
    position = {s: i for i, s in enumerate(sublayers)}
    replacements = {}
    for sublayer in sublayers:
        action = plan.action(phase, sublayer)
        if action is not Action.RUN:
            composed = put_in.get(sublayer)
            replacements[position[sublayer]] = Replacement(
                keep="everything" if action is Action.KV_ONLY else keep,
                surrogate=composed.kind if composed is not None else None,
                rank=composed.rank if composed is not None else 0,
            )
    windowed = tuple(sorted(position[s] for s in plan.windows.of_phase(phase)))
    probe = Probe(tuple(sorted(position[s] for s in probed)), probe_together)
    return run_passes(outer, (*first, WindowAttention(windowed), Skip(replacements), probe))


def window_tensors(
    outer: fx.GraphModule, sublayers: tuple[Sublayer, ...], windows: Mapping[Sublayer, Window]
) -> dict[str, torch.Tensor]:
    """Return the tables of windows that a rewritten graph takes, by input name.

    Args:
        outer: The rewritten graph.
        sublayers: What its calls are, in stream order.
        windows: Those of the plan's phase.
    """
    nodes = outer.graph.find_nodes(op="placeholder")
    examples = {n.name: n.meta.get("example_value") for n in nodes}
    found = {}
    for name, indices in window_inputs(outer.graph).items():
        like = examples[name]
        shape = tuple(map(int, like.shape))
        chosen = (windows.get(sublayers[i], EVERYTHING) for i in indices)
        tables = [window.by_head(shape[-2]) for window in chosen]
        table = torch.tensor(tables, dtype=torch.int64).reshape(shape)
        found[name] = table.to(like.device)
    return found


def surrogate_tensors(
    outer: fx.GraphModule,
    sublayers: tuple[Sublayer, ...],
    surrogates: Mapping[Sublayer, ComposedSurrogate],
    placed: SurrogateTensors,
) -> dict[str, torch.Tensor]:
    """Return the tensors of surrogates that a rewritten graph takes, by input name.

    Raises:
        PlanError: One does not fit the model.
    """
    inputs: dict[int, dict[str, str]] = {}
    for name, (index, tensor) in surrogate_inputs(outer.graph).items():
        inputs.setdefault(index, {})[tensor] = name
    nodes = outer.graph.find_nodes(op="placeholder")
    examples = {n.name: n.meta.get("example_value") for n in nodes}
    found = {}
    for index, names in inputs.items():
        like = {tensor: examples[name] for tensor, name in names.items()}
        sublayer = sublayers[index]
        tensors = placed.get(sublayer, surrogates[sublayer], like)
        found.update({name: tensors[tensor] for tensor, name in names.items()})
    return found
