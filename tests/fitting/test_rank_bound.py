"""Ranks by measured time: what a table allows, what is then fitted, and how ranks are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.api import build
from adaskip_fx.fitting import Fitter, LatencyBound, SecondMoments, SurrogateSpec
from adaskip_fx.fitting.least_squares import smallest_rank, unexplained_variance
from adaskip_fx.fitting.rank_bound import not_decreasing
from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Costs, TableError, low_rank_term, rank_of
from adaskip_fx.measurement.measure import measure, plans_to_time, sublayer_classes
from adaskip_fx.measurement.rank_ladder import rank_ladder, ranks_to_time
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.compose_surrogates import compose_surrogates
from adaskip_fx.plans.skip_plan import Phase, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.profiles.profile import Fingerprint
from adaskip_fx.testing import assert_equivalent
from tests.support import compiled_llamas
from tests.support.second_moments import drawn, moments_of
from tests.support.tokenizers import Letters

FINGERPRINT = Fingerprint("0" * 16, "toy", 1, "0" * 16)
ATTENTION, FFN = Sublayer(0, "attention"), Sublayer(0, "ffn")
SUBLAYERS = tuple(Sublayer(i, kind) for i in range(3) for kind in ("attention", "ffn"))
PREFILL = {"rest": 1.0, "attention": 32.0, "ffn": 64.0, "linear": 16.0}
DECODE = {"rest": 1.0, "attention": 16.0, "ffn": 8.0, "linear": 4.0}
PREFILL |= {low_rank_term(r): 0.5 * r for r in (1, 2, 4, 8)}
DECODE |= {low_rank_term(r): 0.25 * r for r in (1, 2, 4, 8)}


def table(
    prefill: Mapping[str, float] = PREFILL,
    decode: Mapping[str, float] = DECODE,
    sublayers: Sequence[Sublayer] = SUBLAYERS,
    fixed: Sequence[str] = (),
) -> LatencyTable:
    """Costs at 100 tokens; sublayers in `fixed` cannot be skipped."""
    classes = tuple("" if str(s) in fixed else s.kind for s in sublayers)
    costs = (Costs("prefill", 100, prefill), Costs("decode", 100, decode))
    return LatencyTable(FINGERPRINT, {}, tuple(sublayers), classes, costs)


# What a table allows ---------------------------------------------------------------------------


def test_the_largest_rank_whose_time_fits() -> None:
    """By hand: an eighth of 32 and of 64 in a prompt, of 16 and of 8 in a step."""
    expected = {
        "prefill": {ATTENTION: 8, FFN: 8},
        "decode": {ATTENTION: 8, FFN: 4},
        "both": {ATTENTION: 8, FFN: 4},
    }
    for phase, ranks in expected.items():
        bound = LatencyBound(table(), 100, 0.125, phase)  # type: ignore[arg-type]
        assert {s: bound.rank(s) for s in ranks} == ranks
    assert LatencyBound(table(), 100, 0.0625).rank(FFN) == 2  # companion: the share matters
    assert LatencyBound(table(), 100, 0.124).rank(FFN) == 2


def test_where_a_linear_map_fits_there_is_no_bound() -> None:
    """4 of 16 in a step, but in a prompt 16 of 32."""
    assert LatencyBound(table(), 100, 0.25, "decode").rank(ATTENTION) is None
    assert LatencyBound(table(), 100, 0.25).rank(ATTENTION) == 8
    assert LatencyBound(table(), 100, 0.5).rank(ATTENTION) is None


@st.composite
def times(draw: st.DrawFn) -> tuple[dict[str, tuple[int, int]], int]:
    """Seconds of parts in a prompt and in a step, and how many times as long a sublayer must take:
    integers; a larger rank takes no less."""
    ranks = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=5)))
    number = st.integers(1, 40)
    columns = [sorted(draw(number) for _ in ranks) for _ in range(2)]
    seconds = dict(zip(map(low_rank_term, ranks), zip(*columns, strict=True), strict=True))
    if draw(st.booleans()):
        seconds["linear"] = draw(number), draw(number)
    seconds["ffn"] = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    return seconds, draw(st.integers(1, 16))


@given(times())
def test_no_larger_rank_fits(given_: tuple[dict[str, tuple[int, int]], int]) -> None:
    seconds, parts = given_

    def fits(part: str) -> bool:
        return all(parts * t <= o for t, o in zip(seconds[part], seconds["ffn"], strict=True))

    prefill, decode = ({"rest": 1.0, **{n: t[i] for n, t in seconds.items()}} for i in (0, 1))
    measured = table(prefill, decode, [FFN])
    fitting = [r for n in seconds if (r := rank_of(n)) is not None and fits(low_rank_term(r))]
    if "linear" in seconds and fits("linear"):
        assert LatencyBound(measured, 100, 1 / parts).rank(FFN) is None
    elif fitting:
        assert LatencyBound(measured, 100, 1 / parts).rank(FFN) == max(fitting)
    else:
        with pytest.raises(ValueError, match="no low-rank surrogate takes at most"):
            LatencyBound(measured, 100, 1 / parts)


def test_between_contexts_costs_are_interpolated() -> None:
    near, far = table().costs, table({**PREFILL, "ffn": 128.0}, {**DECODE, "ffn": 24.0}).costs
    far = tuple(dataclasses.replace(c, context=300) for c in far)
    both = dataclasses.replace(table(), costs=(*near, *far))
    ranks = [LatencyBound(both, n, 0.125, "decode").rank(FFN) for n in (100, 200, 300)]
    assert ranks == [4, 8, 8]
    assert LatencyBound(both, 300, 3 / 16, "decode").rank(FFN) is None


def test_a_larger_rank_that_seems_quicker_is_noise() -> None:
    """By hand, of seconds 0.25, 0.5, 1 and 2, of which one or two are far off."""

    def largest(share: float, **noise: float) -> int | None:
        noisy = DECODE | {low_rank_term(int(name[1:])): took for name, took in noise.items()}
        return LatencyBound(table(decode=noisy), 100, share, "decode").rank(FFN)

    assert largest(0.125) == 4
    assert largest(0.125, r1=9.0) == 4  # counts as 1, as the next two do
    assert largest(0.125, r2=3.0, r8=1.5) == 1  # all but rank 1 count as 1.5
    assert [largest(share, r4=0.0) for share in (0.05, 0.0625)] == [1, 4]  # counts as 0.5
    assert largest(0.125, r8=0.0) == 8  # counts as 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_times_that_never_decrease(values: list[int]) -> None:
    """No other values that never decrease are nearer, of all that there are to choose from."""
    found = not_decreasing(values)
    assert found == sorted(found)
    least = min(
        distance(values, other)
        for other in combinations_with_replacement(sorted(set(values)), len(values))
    )
    assert distance(values, found) == least
    assert not_decreasing(sorted(values)) == sorted(values)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def test_what_cannot_be_skipped_has_no_bound() -> None:
    bound = LatencyBound(table(fixed=["0.ffn"]), 100, 0.125)
    assert bound.rank(FFN) is None
    assert bound.rank(Sublayer(1, "ffn")) == 4


def test_where_no_rank_fits() -> None:
    message = (
        "no low-rank surrogate takes at most 0.0125 of the time of ffn in decode at 100 tokens: "
        "rank 1, the smallest measured, takes 250 of 8e+03 ms, a share of 0.0312; "
        "allow a larger share, or use a scale"
    )
    with pytest.raises(ValueError, match=r"^no low-rank .*") as caught:
        LatencyBound(table(fixed=[str(s) for s in SUBLAYERS if s.kind != "ffn"]), 100, 0.0125)
    assert str(caught.value) == message
    assert LatencyBound(table(), 100, 1 / 32).rank(FFN) == 1  # near miss


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"share": 0.0}, r"share must be above 0 and at most 1, of a sublayer's time; got 0.0"),
        ({"share": 1.5}, r"share must be above 0 and at most 1, of a sublayer's time; got 1.5"),
        ({"share": float("nan")}, "share must be above 0 and at most 1"),
        ({"phase": "extend"}, "phase must be 'both', 'prefill' or 'decode', got 'extend'"),
        ({"context": 99}, "prefill at 99 tokens: measured were 100; measure again"),
    ],
)
def test_bounds_are_checked(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyBound(**{"table": table(), "context": 100, **given_})


def test_tables_without_ranks_or_of_another_model() -> None:
    plain = {n: t for n, t in DECODE.items() if rank_of(n) is None}
    message = r"the table has no low-rank surrogates; measure again \(adaskip-fx measure --ranks\)"
    with pytest.raises(TableError, match=message):
        LatencyBound(table(plain, plain), 100)
    with pytest.raises(TableError, match="the cost of 'low_rank 1' was not measured"):
        LatencyBound(table(decode=plain), 100)
    with pytest.raises(TableError, match=r"the table has no 3\.ffn: it is of another model"):
        LatencyBound(table(), 100).rank(Sublayer(3, "ffn"))


def test_a_part_is_named_by_its_rank() -> None:
    assert rank_of(low_rank_term(64)) == 64
    assert [rank_of(part) for part in ("linear", "scale", "rest", "attention 2")] == [None] * 4


# What is then fitted ---------------------------------------------------------------------------


def folds_of(noise: float) -> list[SecondMoments]:
    return [moments_of(*drawn(2000, seed=i, noise=noise)) for i in range(3)]


def test_the_smaller_of_what_unseen_texts_ask_for_and_what_fits() -> None:
    many = folds_of(0.01)
    assert (
        SurrogateSpec("low_rank").fit(many).kind == "linear"
    )  # companion: they ask for all there is
    for most, kind in ((1, "low_rank"), (2, "low_rank"), (3, "low_rank"), (None, "linear")):
        fitted = SurrogateSpec("low_rank").fit(many, most)
        assert (fitted.kind, fitted.rank) == (kind, most or 0)
    modest = [rank_one(seed) for seed in range(3)]
    assert smallest_rank(modest, [1, 2, 4])[0] == 1
    assert SurrogateSpec("low_rank").fit(modest, 3).rank == 1  # not above what they ask for
    assert SurrogateSpec("low_rank").fit(many[:1], 3).rank == 1  # nothing is unseen: an eighth of H


def rank_one(seed: int) -> SecondMoments:
    """A sublayer that adds one direction only."""
    x, _ = drawn(1000, seed=seed)
    direction = np.random.default_rng(7).normal(size=(2, x.shape[1]))
    return moments_of(x, x + np.outer(x @ direction[0], direction[1]) / 4)


def test_more_rank_explains_no_less() -> None:
    many = folds_of(0.1)
    total = many[0].plus(many[1]).plus(many[2])
    left = [
        unexplained_variance(total, SurrogateSpec("low_rank", ridge=0.0).fit(many, r))
        for r in (1, 2, 3)
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] > 1.2 * left[-1]


def test_specs_with_a_bound_are_checked() -> None:
    bound = LatencyBound(table(), 100, 0.125)
    for kind, rank, got in (("low_rank", 3, "rank 3"), ("linear", None, "linear")):
        message = f"a latency bound is for a low_rank without a rank, got {got}"
        with pytest.raises(ValueError, match=message):
            SurrogateSpec(kind, rank, bound=bound)  # type: ignore[arg-type]
    same, other = (
        SurrogateSpec("low_rank", bound=LatencyBound(table(), 100, s)) for s in (0.125, 0.0625)
    )
    assert same == SurrogateSpec("low_rank", bound=bound) != other
    assert hash(same) == hash(SurrogateSpec("low_rank", bound=bound))


@pytest.fixture(scope="module")
def fitter() -> Fitter:
    texts = tuple(f"{word} " * 30 for word in ("alpha", "beta", "gamma", "delta"))
    return Fitter(compiled_llamas.make_model("three_layers"), Letters(), texts, max_length=80)


@pytest.mark.slow
@pytest.mark.parametrize("share", [pytest.param(0.0625, marks=pytest.mark.slow), 0.125])
def test_each_sublayer_has_a_rank_of_its_own(fitter: Fitter, share: float) -> None:
    """The smaller of what is found without a bound, in the order of the plan, and what fits."""
    bound = LatencyBound(table(), 100, share)
    bounded, free = SurrogateSpec("low_rank", bound=bound), SurrogateSpec("low_rank")
    plan = fitter.fit(SkipPlan.of(SUBLAYERS, ["0.ffn", "1.attention"]), bounded)
    done: dict[Sublayer, Surrogate] = {}
    asked = []
    for sublayer, surrogate in plan.surrogates.by_sublayer.items():
        seen = fitter.second_moments(Surrogates(done), tuple(done), [sublayer], free)[sublayer]
        asked.append(smallest_rank([m for m in seen if m.tokens], [1, 2, 4, 8, 16])[0])
        most = {FFN: 32 * share, Sublayer(1, "attention"): 64 * share}[sublayer]
        assert surrogate.rank == min(asked[-1], most)
        done[sublayer] = surrogate
    assert asked[0] > 32 * share  # companion: without a bound there is more
    assert_equivalent(compiled_llamas.make_model("three_layers"), plan)


@pytest.mark.slow
def test_what_decoding_may_add_is_bounded_too(fitter: Fitter) -> None:
    none = SkipPlan.empty(SUBLAYERS)
    bound = LatencyBound(table(), 100, 0.0625)
    free, bounded = (
        fitter.fit_running(none, SurrogateSpec("low_rank", bound=b)).by_sublayer
        for b in (None, bound)
    )
    assert [str(s) for s in bounded] == ["0.ffn", "1.ffn", "2.ffn"]
    sizes = [surrogate.rank or 32 for surrogate in free.values()]
    assert [s.rank for s in bounded.values()] == [min(size, 2) for size in sizes]
    assert max(sizes) > 2  # companion: without a bound there is more


# How ranks are timed ---------------------------------------------------------------------------


def planted(phase: Phase, context: int, plan: SkipPlan) -> float:
    """Seconds, surrogate by surrogate, where none has a neighbour that it could be folded with."""
    tokens = context if phase == "prefill" else 1
    took = 3.0
    for sublayer in plan.sublayers:
        surrogate = plan.surrogates.get(sublayer)
        if sublayer not in plan.skipped(phase):
            took += tokens * (0.5 if sublayer.kind == "ffn" else 0.25)
        elif surrogate is not None:
            took += tokens * (0.125 if surrogate.kind == "linear" else 0.015625 * surrogate.rank)
    return took


@pytest.mark.slow
def test_planted_times_of_ranks_come_back() -> None:
    compiled = compiled_llamas.entry("four_layers").compiled  # of width 16
    measured = measure(compiled, [64], ranks=True, surrogates=(), time_step=planted)
    assert measured.warning == ""
    for phase, tokens in (("prefill", 64), ("decode", 1)):
        found = measured.at(phase, 64)  # type: ignore[arg-type]
        ranks = {rank_of(n): seconds for n, seconds in found.items() if rank_of(n) is not None}
        assert ranks == pytest.approx({r: 0.015625 * r * tokens for r in (1, 2, 4)})
        assert found["linear"] == pytest.approx(0.125 * tokens)
    bound = LatencyBound(measured, 64, 0.126)
    assert [bound.rank(s) for s in (ATTENTION, FFN)] == [2, 4]
    without = measure(compiled, [64], surrogates=(), time_step=planted)
    with pytest.raises(TableError, match="the table has no low-rank surrogates"):
        LatencyBound(without, 64)


@pytest.mark.slow
def test_surrogates_that_are_timed_run() -> None:
    """On the device's own clock; no time is asserted."""
    model = compiled_llamas.make_model("three_layers")
    compiled = build(model, None, backend="eager")
    table_ = measure(compiled, [20], rounds=1, ranks=True)
    names = {*table_.at("prefill", 20)}
    assert names == {*table_.at("decode", 20)}
    assert names == {
        "rest",
        "attention",
        "ffn",
        "scale",
        "linear",
        *map(low_rank_term, (1, 2, 4, 8)),
    }
    runtime = runtime_of(compiled)
    classes = sublayer_classes(runtime)
    for surrogates in rank_ladder(runtime.sublayers, classes, runtime.graphs.structure.width):
        skip = list(surrogates.by_sublayer)
        plan = SkipPlan.of(runtime.sublayers, skip, surrogates=surrogates)
        assert_equivalent(model, plan)


CLASSES = st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=2, max_size=12)


@given(CLASSES.filter(any))
def test_no_surrogate_that_is_timed_is_folded(classes: list[str]) -> None:
    """Else its time would be that of another rank, or of two."""
    sublayers = tuple(Sublayer(i // 2, ("attention", "ffn")[i % 2]) for i in range(len(classes)))  # type: ignore[arg-type]
    ladder = rank_ladder(sublayers, classes, 16)
    *_, one, two, four, linear = plans_to_time(sublayers, tuple(classes), ladder)
    for plan, part in ((one, 1), (two, 2), (four, 4), (linear, 0)):
        put_in = compose_surrogates(plan, "decode").values()
        assert put_in, "timed"
        assert all(len(fold.members) == 1 and fold.rank == part for fold in put_in)
        assert len({fold.key for fold in put_in}) == len(put_in)  # weights of their own


def test_neighbours_would_be_folded() -> None:
    """What naming every sublayer would time."""
    ladder = rank_ladder(SUBLAYERS, ["same"] * 6, 16)
    surrogate = next(iter(ladder[0].by_sublayer.values()))
    every = dataclasses.replace(ladder[0], by_sublayer=dict.fromkeys(SUBLAYERS, surrogate))
    plan = plans_to_time(SUBLAYERS, tuple(s.kind for s in SUBLAYERS), [every])[-1]
    assert {one.rank for one in compose_surrogates(plan, "decode").values()} == {2}


def test_ranks_to_time() -> None:
    """Powers of two; at half of H the linear map has as few weights."""
    assert ranks_to_time(16) == (1, 2, 4)
    assert ranks_to_time(17) == (1, 2, 4, 8)
    assert ranks_to_time(4096) == (32, 64, 128, 256, 512, 1024)
    assert ranks_to_time(2) == ()
    assert rank_ladder(SUBLAYERS, [""] * 6, 16) == ()
    assert torch.tensor(ranks_to_time(576)).log2().tolist() == [3, 4, 5, 6, 7, 8]
