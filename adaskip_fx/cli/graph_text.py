"""Show what a plan does to the outer graph of a model: before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import fx

from adaskip_passes.infra.graph_module import text

from ..capture.graph_key import GraphKey
from ..capture.reference import run_reference
from ..model.check_model import check_model
from ..model.subclass import make_compiled_model
from ..plans.skip_plan import Phase, PlanError, SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.surrogates import Surrogates
from ..programs.program_cache import Graphs
from ..programs.rewrite import rewrite
from ..utils.memory_budget import MemoryBudget

_TINY_LAYERS = 2


@dataclass(frozen=True)
class Explained:
    """One phase's outer graph as text, as captured and under a plan.

    Attributes:
        phase: of the graph.
        before: the graph as captured.
        after: the graph under the plan.
    """

    phase: Phase
    before: str
    after: str


def explain(model: Any, plan: SkipPlan) -> Iterator[Explained]:
    """Show what `plan` does to `model`'s prefill, and to its decode where that is different.

    Yields:
        One phase's graph before and after.

    Raises:
        PlanError: the plan is of another model.
        UnsupportedError: the model's sublayers cannot be captured or proven.
    """
    check_model(model)
    graphs = Graphs(
        make_compiled_model(model), model, run_reference(model), "eager", "pieces", MemoryBudget()
    )
    for phase in get_args(Phase):
        if phase == "decode" and plan.phases_alike:
            return
        captured = graphs.capture(GraphKey.plain(phase, model.dtype, model.device))
        if captured.sublayers != plan.sublayers:
            raise PlanError(
                f"the plan is for {len(plan.sublayers)} sublayers, but {type(model).__name__} has "
                f"{len(captured.sublayers)}, or others; name the plan's model with --model"
            )
        outer: fx.GraphModule = captured.outer
        after = rewrite(outer, captured.sublayers, plan, phase)
        yield Explained(phase, text(outer), text(after))


def tiny_llama(layers: int = _TINY_LAYERS) -> Any:
    """Return a Llama of `layers` layers with random weights, for pictures of graphs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.random.fork_rng():
        return LlamaForCausalLM(config).eval()


def excerpt(plan: SkipPlan) -> tuple[SkipPlan, int]:
    """Return two neighbouring layers of a plan, numbered from 0: those where it skips the most.

    Returns:
        The plan of these layers alone, and the number of the first of them in `plan`. A plan of
        at most two layers is returned as it is.

    Raises:
        PlanError: the plan is of no plain transformer, or skips all of the two layers.
    """
    by_layer: dict[int, list[Sublayer]] = {}
    for sublayer in plan.sublayers:
        by_layer.setdefault(sublayer.layer, []).append(sublayer)
    if any([s.kind for s in group] != ["attention", "ffn"] for group in by_layer.values()):
        raise PlanError("the plan is not of a plain transformer; name its model with --model")
    layers = sorted(by_layer)
    if len(layers) <= _TINY_LAYERS:
        return plan, layers[0]
    pairs = list(pairwise(layers))
    changed = {*plan.decode, *plan.windows.sublayers}
    skips = {pair: [s for n in pair for s in by_layer[n] if s in changed] for pair in pairs}
    partial = [
        pair for pair in pairs if not all(s in plan.decode for n in pair for s in by_layer[n])
    ]
    first, second = max(partial, key=lambda pair: len(skips[pair]))
    new = {s: Sublayer(i, s.kind) for i, n in enumerate((first, second)) for s in by_layer[n]}
    kept = {new[s]: c for s, c in plan.surrogates.by_sublayer.items() if s in new}
    short = SkipPlan(
        tuple(new.values()),
        {new[s]: action for s, action in plan.prefill.items() if s in new},
        {new[s]: action for s, action in plan.decode.items() if s in new},
        Surrogates(kept),
        windows=plan.windows.renamed(new),
    )
    return short, first


def _all_skipped(
    plan: SkipPlan, layers: Iterable[int], by_layer: Mapping[int, Sequence[Sublayer]]
) -> bool:
    return all(s in plan.decode for layer in layers for s in by_layer[layer])
