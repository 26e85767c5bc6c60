"""Greedy and Evolve: their choices against brute force and lists by hand, on toy losses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import AdaSkip, Evolve, Greedy, LLMDrop, OnlinePolicy
from tests.support.compiled_llamas import entry, profile_of
from tests.support.decisions import SHAPE
from tests.support.profiles import KINDS, profile

LAYERS = 4
NAMES = [f"{i}.{kind}" for i in range(LAYERS) for kind in KINDS]


class Toy:
    """A loss of single costs, and more where two are gone together; it keeps what it was asked."""

    def __init__(self, costs: dict[str, float], pairs: dict[tuple[str, str], float]) -> None:
        self.costs, self.pairs = costs, pairs
        self.asked: list[tuple[SkipPlan, int | None]] = []

    def of(self, names: set[str]) -> float:
        together = (c for pair, c in self.pairs.items() if names >= set(pair))
        return sum(self.costs[n] for n in names) + sum(together)

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        self.asked.append((plan, samples))
        return self.of(set(map(str, plan.skipped("prefill"))))


COSTS = dict(zip(NAMES, [9, 3, 1, 4, 2, 8, 7, 6], strict=True))


def names(plan: SkipPlan) -> list[str]:
    assert plan.skipped("decode") == plan.skipped("prefill")
    return [str(s) for s in plan.skipped("prefill")]


def test_greedy_by_hand() -> None:
    """1.attention goes first (1), and makes 2.attention dear (2 + 5): 0.ffn (3), 1.ffn (4)."""
    toy = Toy(COSTS, {("1.attention", "2.attention"): 5.0})
    assert names(Greedy(toy).plan(profile(LAYERS), 1.6)) == ["0.ffn", "1.attention", "1.ffn"]
    assert len(toy.asked) == 8 + 7 + 6
    plain = Toy(COSTS, {})
    found = Greedy(plain, samples=2).plan(profile(LAYERS), 1.6)
    assert names(found) == ["0.ffn", "1.attention", "2.attention"]
    assert {samples for _, samples in plain.asked} == {2}


def by_loops(toy: Toy, count: int, free: list[str]) -> list[str]:
    """The greedy choice again, as plain loops over names."""
    gone: list[str] = []
    for _ in range(count):
        best, least = "", math.inf
        for name in free:
            if name not in gone and toy.of({*gone, name}) < least:
                best, least = name, toy.of({*gone, name})
        gone.append(best)
    return sorted(gone, key=NAMES.index)


DRAWN = st.lists(st.integers(1, 10**6), min_size=8, max_size=8, unique=True)


@given(DRAWN, st.data(), st.booleans())
def test_greedy_by_loops(costs: list[int], data: Any, protected: bool) -> None:
    pairs = data.draw(
        st.dictionaries(st.sampled_from(list(itertools.combinations(NAMES, 2))), st.floats(0, 9e5))
    )
    toy = Toy(dict(zip(NAMES, map(float, costs), strict=True)), pairs)
    alpha, count = (4 / 3, 2) if protected else (1.6, 3)
    free = ["2.attention", "2.ffn"] if protected else NAMES
    found = names(Greedy(toy, protected=protected).plan(profile(LAYERS), alpha))
    assert found == by_loops(toy, count, free)


def test_a_shortlist_is_of_the_most_similar() -> None:
    measured = profile(LAYERS, {"0.attention": 0.9, "3.ffn": 0.8, "2.ffn": 0.7})
    toy = Toy(COSTS, {})
    plan = Greedy(toy, shortlist=2).plan(measured, 1.3)
    assert names(plan) == ["2.ffn", "3.ffn"], "6 of 9 and 6, then 8 of 9 and 8"
    assert len(toy.asked) == 4
    kept = frozenset({Sublayer(3, "ffn")})
    assert "3.ffn" not in names(Greedy(toy, never=kept).plan(measured, 2.0))


def test_compensation_is_fitted_for_every_candidate() -> None:
    fitted: list[tuple[Sublayer, ...]] = []

    def fit_surrogates(
        skipped: tuple[Sublayer, ...], known: tuple[Sublayer, ...] = ()
    ) -> Surrogates:
        assert set(known) < set(skipped)
        assert len(known) == len(skipped) - 1
        fitted.append(skipped)
        return Surrogates.scale({s: 1.0 + len(skipped) / 8 for s in skipped})

    toy = Toy(COSTS, {})
    plan = Greedy(toy, fit_surrogates).plan(profile(LAYERS), 1.3)
    assert names(plan) == ["1.attention", "2.attention"]
    assert set(plan.surrogates.factors.values()) == {1.25}
    assert len(fitted) == 8 + 7
    assert all(list(skipped) == sorted(skipped) for skipped in fitted)
    scaled = Greedy(toy, scaled=True).plan(profile(LAYERS), 1.3)
    assert set(scaled.surrogates.factors.values()) == {0.75}


def test_nothing_is_judged_at_one() -> None:
    toy = Toy(COSTS, {})
    for policy in (Greedy(toy), Evolve(toy)):
        assert policy.plan(profile(LAYERS), 1.0) == SkipPlan.empty(profile(LAYERS).sublayers)
    assert not toy.asked


# Evolution -------------------------------------------------------------------------------------


@given(DRAWN, st.integers(0, 2**16))
def test_evolution_finds_the_best_of_all_sets(costs: list[int], seed: int) -> None:
    """3 of 8, costs alone: within 40 generations of 16 it finds what brute force finds."""
    toy = Toy(dict(zip(NAMES, map(float, costs), strict=True)), {})
    found = Evolve(toy, same_kind=False, seed=seed).plan(profile(LAYERS), 1.6)
    best = min(itertools.combinations(NAMES, 3), key=lambda chosen: toy.of(set(chosen)))
    assert names(found) == sorted(best, key=NAMES.index)


def test_attention_changes_places_with_attention() -> None:
    toy = Toy(COSTS, {})
    start = LLMDrop("joint")
    measured = profile(LAYERS, {"0.attention": 0.9, "3.attention": 0.8, "2.ffn": 0.7})
    found = Evolve(toy, start).plan(measured, 1.6)
    assert names(found) == ["0.ffn", "1.attention", "2.attention"]
    counts = {sum(s.kind == "ffn" for s in plan.skipped("prefill")) for plan, _ in toy.asked}
    assert counts == {1}
    sizes = {len(plan.skipped("prefill")) for plan, _ in toy.asked}
    assert sizes == {3}


def test_it_never_gets_worse_and_repeats_itself() -> None:
    measured = profile(LAYERS, {"0.attention": 0.9, "3.attention": 0.8, "2.ffn": 0.7})
    losses = []
    for generations in range(1, 12):
        toys = [Toy(COSTS, {("1.attention", "2.attention"): 5.0}) for _ in range(2)]
        plans = [Evolve(toy, generations=generations, seed=3).plan(measured, 1.6) for toy in toys]
        assert plans[0] == plans[1]
        assert toys[0].asked == toys[1].asked
        losses.append(toys[0].of(set(names(plans[0]))))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_selection_judges_fewer_on_more_samples() -> None:
    toy = Toy(COSTS, {})
    selection = ((4, 1), (2, 3), (1, None))
    Evolve(toy, generations=1, offspring=30, selection=selection).plan(profile(LAYERS), 1.6)
    asked = [samples for _, samples in toy.asked]
    assert asked.count(3) == 4
    assert asked.count(None) == 2 + 1, "the parent takes part in the last step"
    assert asked.count(1) > 4


def test_who_is_never_skipped_never_comes_in() -> None:
    toy = Toy(dict.fromkeys(NAMES, 1.0) | {"1.attention": 0.0}, {})
    never = frozenset({Sublayer(1, "attention")})
    start = LLMDrop("attention")
    measured = profile(LAYERS, {"0.attention": 0.9, "3.attention": 0.8})
    found = Evolve(toy, start, never=never, protected=True).plan(measured, 4 / 3)
    assert "1.attention" not in names(found)
    assert all(s not in plan.skipped("prefill") for plan, _ in toy.asked for s in never)


def test_refusals() -> None:
    toy = Toy(COSTS, {})
    with pytest.raises(ValueError, match="4 of 8 sublayers are to be skipped, but Greedy may skip"):
        Greedy(toy, protected=True).plan(profile(LAYERS), 2.0)
    with pytest.raises(ValueError, match="Greedy: shortlist must be at least 1, got 0"):
        Greedy(toy, shortlist=0)
    with pytest.raises(ValueError, match="Evolve: generations must be at least 1, got 0"):
        Evolve(toy, generations=0)
    with pytest.raises(ValueError, match="Evolve: the last step of selection leaves one survivor"):
        Evolve(toy, selection=((4, 1),))
    for policy in (Greedy(toy), Evolve(toy)):
        assert not isinstance(policy, OnlinePolicy)
        with pytest.raises(ValueError, match="alpha, the acceleration ratio"):
            policy.plan(profile(LAYERS), 0.5)


# On a model ------------------------------------------------------------------------------------


def test_on_a_model_greedy_is_no_worse_than_similarity() -> None:
    bank = entry(SHAPE)
    loss = CalibrationLoss(bank.compiled, [bank.tokens(1, 30, 1), bank.tokens(1, 20, 2)])
    similarity = {str(s): 0.9 - 0.1 * i for i, s in enumerate(bank.sublayers)}
    measured = profile_of(bank, similarity)
    captures = bank.runtime.counters.captures
    greedy = Greedy(loss).plan(measured, 1.5)
    evolved = Evolve(loss, generations=3, offspring=6).plan(measured, 1.5)
    plain = LLMDrop("joint").plan(measured, 1.5)
    assert loss(greedy) <= loss(plain)
    assert loss(evolved) <= loss(plain)
    every = [SkipPlan.of(bank.sublayers, two) for two in itertools.combinations(bank.sublayers, 2)]
    best = min(map(loss, every))
    assert best <= min(loss(greedy), loss(evolved))
    assert loss(AdaSkip().plan(measured, 1.0)) < best
    assert bank.runtime.counters.captures <= captures + 1
