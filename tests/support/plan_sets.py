"""What a plan computes as a set, written out, and plans to draw whose unions often exist."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

from hypothesis import strategies as st

from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows

# Tokens and heads of the sets: no window of these tests has head 2 full or spans the length.
LENGTH, HEADS = 7, 3
WINDOWS = st.builds(
    Window, st.integers(1, 3), st.integers(0, 2), st.sets(st.integers(0, 1)).map(tuple)
)
SUBLAYERS = tuple(
    map(Sublayer.parse, ("0.attention", "0.ffn", "1.attention", "1.ffn", "2.mixer", "2.ffn"))
)
ATTENTION, FFN = SUBLAYERS[:2]

#: what happens to a sublayer in a phase; None: it runs and sees everything
Reduction: TypeAlias = Window | Action | None
Pair: TypeAlias = tuple[Reduction, Reduction]  #: in prefill and in decode
Pairs: TypeAlias = dict[Sublayer, Pair]

RUN, KV_ONLY, SKIP = None, Action.KV_ONLY, Action.SKIP
#: closed under what is joined, and with two windows of which neither is within the other
FEW: tuple[Reduction, ...] = (RUN, Window(2, 0), Window(1, 1), Window(1, 0), KV_ONLY)
PAIRS: dict[str, list[Pair]] = {
    "attention": [*itertools.product(FEW, FEW), (SKIP, SKIP)],
    "mixer": [*itertools.product((RUN, KV_ONLY), (RUN, KV_ONLY)), (SKIP, SKIP)],
    "ffn": [*itertools.product((RUN, SKIP), (RUN, SKIP))],
}


def seen(window: Window | None) -> set[tuple[int, int, int]]:
    """The (head, t, j) where the token at t sees the one at j."""
    pairs = {(h, t, j) for h in range(HEADS) for t in range(LENGTH) for j in range(t + 1)}
    if window is None:
        return pairs
    return {
        (h, t, j)
        for h, t, j in pairs
        if h in window.full_heads or t - j < window.tokens or j < window.sinks
    }


def computed(pairs: Pairs, last_token_full: bool) -> frozenset[Any]:
    """What is stored, put out and seen in prompts, in their last token and in decode."""
    found: set[Any] = set()
    for place, phase in (("prompt", 0), ("last", int(last_token_full)), ("decode", 1)):
        for s, pair in pairs.items():
            if pair[phase] is not SKIP:
                found.add((place, s, "stored"))
            if not isinstance(pair[phase], Action):
                everything = seen(pair[phase]) if s.kind == "attention" else ()
                found |= {(place, s, "put out"), *((place, s, *one) for one in everything)}
    return frozenset(found)


def computed_by(plan: SkipPlan) -> frozenset[Any]:
    """What a plan computes: see `computed`."""

    def happens(actions: Any, windows: Any, sublayer: Sublayer) -> Reduction:
        return actions.get(sublayer) or windows.get(sublayer)

    phases = (plan.prefill, plan.windows.prefill), (plan.decode, plan.windows.decode)
    pairs = {s: (happens(*phases[0], s), happens(*phases[1], s)) for s in plan.sublayers}
    return computed(pairs, plan.last_token_full)


def plan_of(
    pairs: Pairs, last_token_full: bool = False, factors: dict[Sublayer, float] | None = None
) -> SkipPlan:
    """The plan that does to each sublayer what its pair says in prefill and in decode."""
    phases = [{s: pair[p] for s, pair in pairs.items()} for p in (0, 1)]
    actions = [{s: r for s, r in p.items() if isinstance(r, Action)} for p in phases]
    windows = [{s: r for s, r in p.items() if isinstance(r, Window)} for p in phases]
    scales = Surrogates.scale(factors or {})
    return SkipPlan(tuple(pairs), *actions, scales, last_token_full, Windows(*windows))


def some_run(pairs: Pairs) -> bool:
    """Whether something runs in each phase."""
    return all(any(not isinstance(pair[p], Action) for pair in pairs.values()) for p in (0, 1))


def every_choice() -> list[tuple[Pairs, bool]]:
    """All that can happen to one attention and one ffn, also where nothing is left that runs."""
    both = itertools.product(PAIRS["attention"], PAIRS["ffn"], (False, True))
    return [({ATTENTION: first, FFN: second}, last) for first, second, last in both]


def united(*plans: SkipPlan) -> SkipPlan | None:
    """The union from left to right; None where there is none."""
    try:
        return functools.reduce(operator.or_, plans)
    except PlanError:
        return None


@st.composite
def several(draw: st.DrawFn, count: int, *, plain: bool = False) -> Sequence[SkipPlan]:
    """Draw plans of one model, most of which agree in surrogates and in `last_token_full`.

    Args:
        draw: supplied by hypothesis.
        count: how many.
        plain: none has a surrogate, and all are alike in `last_token_full`.
    """
    known = {} if plain else draw(st.dictionaries(st.sampled_from(SUBLAYERS), st.just(0.5)))
    last = draw(
        st.sampled_from([(False,), (True,)] if plain else [(False,), (True,), (False, True)])
    )
    return [draw(_one(known, last, plain)) for _ in range(count)]


@st.composite
def _one(
    draw: st.DrawFn, known: dict[Sublayer, float], last: tuple[bool, ...], plain: bool
) -> SkipPlan:
    pairs: Pairs = {}
    for s in SUBLAYERS:
        pairs[s] = draw(st.sampled_from(PAIRS[s.kind]), label=str(s))
        if s.kind == "attention" and SKIP not in pairs[s]:
            wide = [st.just(r) if r is KV_ONLY else st.none() | WINDOWS for r in pairs[s]]
            pairs[s] = (draw(wide[0]), draw(wide[1]))
    if not some_run(pairs):
        pairs[SUBLAYERS[-1]] = (RUN, RUN)
    own = st.dictionaries(st.sampled_from(SUBLAYERS), st.sampled_from((0.5, 0.9)), max_size=1)
    factors = {} if plain else {**known, **draw(st.just({}) | own)}
    idle = [s for s in factors if not _left_out(pairs[s])]
    for s in draw(st.sets(st.sampled_from(idle))) if idle else ():
        del factors[s]
    return plan_of(pairs, draw(st.sampled_from(last)), factors)


def _left_out(pair: Pair) -> bool:
    return any(isinstance(r, Action) for r in pair)
