"""Searches for better plans of drafts, beside what is best by trying all of them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pytest

from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Costs
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.profiles.fingerprint import Fingerprint
from adaskip_fx.speculation.controller import Controller
from adaskip_fx.speculation.knapsack import KnapSpec
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.refinement import Space
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from adaskip_fx.speculation.swift import Swift, posterior
from adaskip_fx.speculation.times import PLAIN

SUBLAYERS = tuple(Sublayer(layer, kind) for layer in range(6) for kind in ("attention", "ffn"))
GOOD = frozenset(SUBLAYERS[i] for i in (3, 6, 7, 10))
BEGUN = SkipPlan.of(SUBLAYERS, SUBLAYERS[:4])


def share(skipped: Collection[Sublayer]) -> float:
    """A matchness that is the greater, the more of the good sublayers are left out."""
    return 0.4 + 0.15 * len(GOOD.intersection(skipped))


def searched(swift: Swift) -> list[float]:
    """The matchness of each candidate."""
    search, found = swift.begin(Space(BEGUN, SUBLAYERS)), list[float]()
    while (plan := search.candidate()) is not None:
        found.append(share(plan.skipped("decode")))
        search.measured(plan, found[-1])
    assert share(search.plan(100).skipped("decode")) == max(found) == search.best
    return found


# SWIFT -------------------------------------------------------------------------------------------


def test_it_begins_with_the_plan_and_ends_with_what_is_enough() -> None:
    found = searched(Swift(enough=1.0, every=4))
    assert found[0] == share(BEGUN.skipped("decode"))
    assert found[-1] == max(found) == 1.0
    assert all(value < 1.0 for value in found[:-1])


def test_what_others_have_come_to_leads_to_better_sets_sooner() -> None:
    """Than drawing alone, which is the companion: `every` is beyond the steps there."""
    steps = [len(searched(Swift(1.0, seed=seed, every=2))) for seed in range(5)]
    drawn = [len(searched(Swift(1.0, seed=seed, every=10**6))) for seed in range(5)]
    assert sum(steps) < 0.5 * sum(drawn)


def test_it_gives_up() -> None:
    assert len(searched(Swift(steps=7))) <= 7
    found = searched(Swift(1.0, patience=3, every=10**6, seed=3))
    better = [i for i, value in enumerate(found) if value > max(found[:i], default=0.0)]
    assert len(found) == better[-1] + 1 + 3


def test_sets_are_of_what_may_be_skipped_and_as_large_as_the_plan() -> None:
    search = Swift(1.0, every=2).begin(Space(BEGUN, SUBLAYERS[2:]))
    for _ in range(8):
        plan = search.candidate()
        assert plan is not None
        assert len(plan.skipped("decode")) == 4
        search.measured(plan, 0.1)
        if plan is not BEGUN:
            assert not set(SUBLAYERS[:2]) & set(plan.skipped("decode"))


def test_a_gaussian_process_by_hand() -> None:
    """Of one point: it is believed as far as its noise allows, and nothing is known far from it."""
    known, values = np.array([[1.0, 0.0] * 20]), np.array([0.5])
    far = 1 - known
    means, deviations = posterior(known, values, np.concatenate((known, far)))
    assert means == pytest.approx([0.5, 0.5])
    assert deviations[0] == pytest.approx((0.0025 - 0.0025**2 / 0.005) ** 0.5)
    assert deviations[1] == pytest.approx(0.05, rel=0.01)


def test_what_stands_in_and_what_is_seen_goes_along() -> None:
    plan = SkipPlan.of(
        SUBLAYERS, ["0.ffn"], windows=Windows.of(["0.attention", "1.attention"], Window(8))
    )
    scales = Surrogates.scale(dict.fromkeys(SUBLAYERS, 1.5))
    found = Space(plan, SUBLAYERS, None, scales).skipping(SUBLAYERS[2:4])
    assert set(found.windows.decode) == {SUBLAYERS[0]}
    assert set(found.surrogates.factors) == set(SUBLAYERS[2:4])
    own = SkipPlan.of(SUBLAYERS, ["0.ffn"], surrogates=Surrogates.scale({SUBLAYERS[1]: 0.5}))
    assert Space(own, SUBLAYERS, None, scales).skipping(SUBLAYERS[1:2]) == own


# KnapSpec ----------------------------------------------------------------------------------------


def table(seconds: dict[int, float]) -> LatencyTable:
    """Attention takes so long by context, an FFN 3."""
    classes = tuple(s.kind for s in SUBLAYERS)
    costs = tuple(
        Costs("decode", context, {"attention": took, "ffn": 3.0, "rest": 2.0})
        for context, took in seconds.items()
    )
    print_of: Any = Fingerprint
    return LatencyTable(fingerprint_of_nothing(print_of), {}, SUBLAYERS, classes, costs)


def fingerprint_of_nothing(kind: Any) -> Any:
    return kind.__new__(kind)


def by_trying_all(likeness: dict[Sublayer, float], attention: float, drafts: int) -> float:
    """The most tokens a second of all sets."""
    best, full = 0.0, 6 * attention + 6 * 3.0 + 2.0
    for size in range(len(SUBLAYERS)):
        for chosen in itertools.combinations(SUBLAYERS, size):
            accepted = float(np.prod([likeness[s] for s in chosen]))
            took = full - sum(attention if s.kind == "attention" else 3.0 for s in chosen)
            tokens = sum(accepted**i for i in range(drafts + 1))
            best = max(best, tokens / (drafts * took + full) if size else 1 / full)
    return best


@pytest.mark.parametrize("attention", [1.0, 12.0])
def test_the_knapsack_gives_nearly_the_most_tokens_for_the_time(attention: float) -> None:
    draw = random.Random(int(attention))
    likeness = {s: draw.uniform(0.9, 0.999) for s in SUBLAYERS}
    refine = KnapSpec(table({64: attention, 128: attention}), drafts=5, savings=40)
    plan = refine.begin(Space(BEGUN, SUBLAYERS, likeness)).plan(100)
    skipped = plan.skipped("decode")
    accepted = float(np.prod([likeness[s] for s in skipped]))
    full = 6 * attention + 20.0
    took = full - sum(attention if s.kind == "attention" else 3.0 for s in skipped)
    worth = sum(accepted**i for i in range(6)) / (5 * took + full)
    assert worth >= 0.98 * by_trying_all(likeness, attention, 5)
    assert worth > 1 / full


def test_attention_goes_first_where_it_takes_longest() -> None:
    likeness = dict.fromkeys(SUBLAYERS, 0.97)
    choice = KnapSpec(table({64: 1.0, 4096: 30.0})).begin(Space(BEGUN, SUBLAYERS, likeness))
    short, long = (
        Counter(s.kind for s in choice.plan(stored).skipped("decode")) for stored in (10, 10_000)
    )
    assert short["ffn"] > short["attention"]
    assert long["attention"] > long["ffn"]
    assert choice.plan(4000) == choice.plan(4001)
    assert choice.candidate() is None


def test_without_a_profile_there_is_nothing_to_choose_by() -> None:
    with pytest.raises(ValueError, match="give compile a profile"):
        KnapSpec(table({64: 1.0})).begin(Space(BEGUN, SUBLAYERS))


# What it may take --------------------------------------------------------------------------------


def test_measuring_plans_takes_a_hundredth_of_the_time() -> None:
    controller, measured = Controller(lambda: 0.0), 0
    for _ in range(20_000):
        controller.took(1, 100, PLAIN, 1, 0.5)
        while controller.affords(1, 100):
            controller.measured(1, 100, 0.5 * 10)
            measured += 1
    assert 0.009 < 10 * measured / 20_000 <= 0.01 + 8 / 20_000


def test_one_search_serves_all_requests() -> None:
    speculation = Speculation(Lossless(), BEGUN)
    assert speculation.refinement(Swift(), BEGUN) is speculation.refinement(Swift(), BEGUN)
    assert speculation.refinement(Swift(seed=1), BEGUN) is not speculation.refinement(
        Swift(), BEGUN
    )


def test_options_that_mean_nothing() -> None:
    for options in ({"enough": 0.0}, {"enough": 1.5}, {"steps": 0}, {"patience": 0}, {"every": 0}):
        with pytest.raises(ValueError, match=f"Swift\\({next(iter(options))}=...\\) must be"):
            Swift(**options)  # type: ignore[arg-type]
    for options in ({"drafts": 0}, {"savings": 0}):
        with pytest.raises(ValueError, match=f"KnapSpec\\({next(iter(options))}=...\\) must be"):
            KnapSpec(table({64: 1.0}), **options)
    with pytest.raises(ValueError, match="leave one of the two out"):
        Skipped(BEGUN, [SkipPlan.of(SUBLAYERS, SUBLAYERS[:1])], Swift())  # type: ignore[arg-type]
