"""The cost terms of a step under a plan, whose seconds add up to its time.

A term is a class of sublayers that run, such a class with a window, a kind of surrogate, or
`OVERHEAD`: what comes before and after the sublayers, and launching it all. Attention whose heads
differ is that part of a sublayer that sees everything, that part of one with a window, and what it
costs that they differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from adaskip_fx.plans.compose_surrogates import ComposedSurrogate, compose_surrogates
from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_passes.errors import AdaskipError

OVERHEAD = "rest"  #: this word is in saved tables

#: One phase, or how often each counts: `{"prefill": 1, "decode": n}` for a request of n tokens.
Weights = Phase | Mapping[Phase, float]


class TableError(AdaskipError, ValueError):
    """A latency table that is damaged, of something else, or does not cover what is asked."""


@dataclass(frozen=True)
class Costs:
    """What was measured for one phase at one context.

    Attributes:
        phase: prefill (a prompt of `context` tokens) or decode (a step at `context` stored ones).
        context: tokens.
        seconds: of each cost term: by class of sublayer, by kind of surrogate, and `OVERHEAD`.
        error: the largest relative error of the sum, in the plans that were timed.

    Raises:
        TableError: an unknown phase, a negative cost, or no cost of `OVERHEAD`.
    """

    phase: Phase
    context: int
    seconds: Mapping[str, float]
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise TableError(f"unknown phase {self.phase!r}: use 'prefill' or 'decode'")
        if OVERHEAD not in self.seconds or any(not value >= 0 for value in self.seconds.values()):
            raise TableError(f"costs must be at least 0 and name {OVERHEAD!r}, got {self.seconds}")
        object.__setattr__(self, "seconds", MappingProxyType(dict(self.seconds)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return Costs, (self.phase, self.context, dict(self.seconds), self.error)


def cost_terms(
    plan: SkipPlan,
    phase: Phase,
    sublayers: tuple[Sublayer, ...],
    classes: tuple[str, ...],
    kv_heads: tuple[int, ...] = (),
) -> dict[str, float]:
    """Return the cost terms of a step of `plan`, each with how often it occurs.

    Args:
        plan: what runs.
        phase: prefill or decode.
        sublayers: the sublayers of the table, in stream order.
        classes: the class of each of them; empty for one that cannot be skipped.
        kv_heads: how many K/V heads each has; empty if that is not known.

    Returns:
        Counts, whose keys are those of `Costs.seconds`; parts of one for some heads of attention.

    Raises:
        TableError: the plan is of other sublayers, skips one that cannot be skipped, or gives
            single heads windows where it is not known how many there are.
    """
    if plan.sublayers != sublayers:
        raise TableError(
            f"the plan has {len(plan.sublayers)} sublayers and the table {len(sublayers)}, or "
            "their order differs: they are of different models"
        )
    counts = Counter[str]()
    heads = kv_heads or (0,) * len(sublayers)
    for sublayer, name, count in zip(sublayers, classes, heads, strict=True):
        action, window = plan.action(phase, sublayer), plan.windows.get(phase, sublayer)
        if not name and action is not Action.RUN:
            raise TableError(f"{sublayer} cannot be skipped: later layers read what it computes")
        if window is not None:
            counts.update(window_terms(name, window, count, str(sublayer)))
        elif action is not Action.SKIP:
            counts[kv_only_term(name) if action is Action.KV_ONLY else name] += 1
    del counts[""]
    counts.update(map(surrogate_term, compose_surrogates(plan, phase).values()))
    return {OVERHEAD: 1.0, **{name: float(n) for name, n in counts.items()}}


def window_terms(name: str, window: Window, heads: int, sublayer: str) -> dict[str, float]:
    """Return the terms of attention of class `name` with a window, each with how often it occurs.

    Args:
        name: the class; empty for what cannot be skipped.
        window: what it sees.
        heads: how many K/V heads it has; 0 if that is not known.
        sublayer: its name, for messages.

    Raises:
        TableError: the class is empty, or heads differ and it is not known how many there are.
    """
    if not name:
        raise TableError(
            f"{sublayer} has a window, whose time is not measured: it cannot be skipped"
        )
    if not window.full_heads:
        return {window_term(name, window): 1.0}
    if not heads:
        raise TableError(
            f"{sublayer} has a window in some heads, but the table does not say how many there "
            "are; measure again (adaskip-fx measure)"
        )
    full = len(window.full_heads) / heads
    return {name: full, window_term(name, window): 1 - full, heads_term(name): 1.0}


def window_term(name: str, window: Window) -> str:
    """Return the cost term of a sublayer of class `name` all of whose heads have a window."""
    return f"{name}, window {window.sinks}+{window.tokens}"


def heads_term(name: str) -> str:
    """Return the cost term of heads that differ in a sublayer of class `name`."""
    return f"{name}, heads apart"


def surrogate_term(composed: ComposedSurrogate) -> str:
    """Return the cost term of the surrogate of skipped sublayers: its kind, and its rank."""
    return low_rank_term(composed.rank) if composed.rank else composed.kind


def low_rank_term(rank: int) -> str:
    """Return the cost term of a low-rank map."""
    return f"low_rank {rank}"


def rank_of(term: str) -> int | None:
    """Return the rank that `low_rank_term` wrote into `term`; None for another term."""
    kind, _, rank = term.partition(" ")
    return int(rank) if kind == "low_rank" else None


def kv_only_term(name: str) -> str:
    """Return the cost term of a sublayer of class `name` that only writes its K/V."""
    return f"{name}, K/V only"


def weights_of(phase: Weights) -> Mapping[Phase, float]:
    """Return how often each phase counts, without those that do not.

    Raises:
        ValueError: an unknown phase, or weights that are negative or all 0.
    """
    weights: Mapping[Phase, float] = {phase: 1.0} if isinstance(phase, str) else dict(phase)
    good = all(name in get_args(Phase) and weight >= 0 for name, weight in weights.items())
    if not good or not sum(weights.values()) > 0:
        raise ValueError(
            f"phase must be 'prefill', 'decode' or how often each counts, like "
            f"{{'prefill': 1, 'decode': 200}}; got {phase!r}"
        )
    return {name: weight for name, weight in weights.items() if weight}


def goals_of(phase: Weights | Literal["both"]) -> tuple[Mapping[Phase, float], ...]:
    """Return what is to be faster, each as weights of phases: each of both phases, or one sum.

    Raises:
        ValueError: as for `weights_of`.
    """
    if phase == "both":
        return tuple({name: 1.0} for name in get_args(Phase))
    return (weights_of(phase),)


def named(weights: Mapping[Phase, float]) -> str:
    """Return weights of phases as a person would write them."""
    if len(weights) == 1:
        return next(iter(weights))
    return " + ".join(f"{weight:g} {phase}" for phase, weight in weights.items())


def between(low: Costs, high: Costs, context: int) -> Mapping[str, float]:
    """Return seconds by cost term at a context between two that were measured.

    See `LatencyTable.at` for what is interpolated.
    """
    share = (context - low.context) / (high.context - low.context)
    found = {}
    for name in low.seconds.keys() & high.seconds.keys():
        by_token = low.phase == "prefill" and name != OVERHEAD
        unit = (low.context, high.context, context) if by_token else (1, 1, 1)
        first, last = low.seconds[name] / unit[0], high.seconds[name] / unit[1]
        found[name] = unit[2] * ((1 - share) * first + share * last)
    return found
