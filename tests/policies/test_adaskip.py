"""AdaSkip's choices, against the formulas written out with exact fractions and plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import NO_SURROGATES
from adaskip_fx.policies import AdaSkip, OnlinePolicy, Policy
from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.profiles.profile import Fingerprint, Profile, Variant

PROPERTY = settings(deadline=None)  # a shared machine may stall
BOTH: tuple[Variant, ...] = ("paper", "released")


def sub(text: str) -> Sublayer:
    return Sublayer.parse(text)


def profile(similarity: dict[str, float], ratio: float = 0.5) -> Profile:
    """One sample of 4 tokens; |b| / |a| is `ratio` at the first sublayer, 1/64 more at each."""
    rows = [
        (4 * value, 4 * (ratio + i / 64), 4.0, 4 * (ratio + i / 64) ** 2, 4)
        for i, value in enumerate(similarity.values())
    ]
    names = tuple(map(sub, similarity))
    return Profile(names, np.array([rows]), Fingerprint("0" * 16, "toy", 1, "0" * 16), {}, {})


# How many --------------------------------------------------------------------------------------


def count_by_search(alpha: Fraction, total: int) -> int:
    """The largest n with n <= S (1 - 1/alpha) + 1/2, in integers and without a division."""
    p, q = alpha.numerator, alpha.denominator
    return max(n for n in range(total + 1) if 2 * n * p <= 2 * total * (p - q) + p)


def test_the_papers_own_counts() -> None:
    assert skip_count(1.143, 64) == 8
    assert skip_count(1.333, 64) == 16
    assert skip_count(1, 64) == 0
    assert skip_count(2, 64) == 32


@PROPERTY
@given(st.integers(1, 200), st.integers(1, 5000), st.integers(1, 5000))
def test_count_is_the_formula(total: int, p: int, q: int) -> None:
    alpha = Fraction(p, q)
    assume(1 <= alpha < 2 * total)
    assert skip_count(float(alpha), total) == count_by_search(alpha, total)


@PROPERTY
@given(st.integers(1, 200), st.data())
def test_count_rounds_a_half_up(total: int, data: st.DataObject) -> None:
    """alpha = 2S / (2S - 2n + 1) puts S (1 - 1/alpha) exactly at n - 1/2."""
    n = data.draw(st.integers(1, total))
    alpha = Fraction(2 * total, 2 * total - 2 * n + 1)
    if n == total:  # alpha is 2S
        with pytest.raises(ValueError, match="would skip all"):
            skip_count(float(alpha), total)
    else:
        assert skip_count(float(alpha), total) == n


@PROPERTY
@given(st.integers(1, 300), st.floats(1, 600, allow_nan=False))
def test_count_of_any_float_is_within_rounding(total: int, alpha: float) -> None:
    assume(alpha < 2 * total)
    exact = total * (1 - 1 / Fraction(alpha))
    count = skip_count(alpha, total)
    assert abs(count - exact) <= Fraction(1, 2) + Fraction(1, 10**6)
    assert 0 <= count < total


def test_count_at_the_upper_edge() -> None:
    assert skip_count(math.nextafter(8, 0), 4) == 3
    assert skip_count(1.999, 1) == 0


HUGE = pytest.param(10**400, id="huge")
BAD = [0.999, 0, -1, 8.0, 1e300, HUGE, math.nan, math.inf, -math.inf, "2", None, True, 2j]


@pytest.mark.parametrize("alpha", BAD)
def test_count_refuses(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1 .* below 8 .* all 4 sublayers") as caught:
        skip_count(alpha, 4)
    assert str(caught.value).endswith(f"got {alpha!r}")


def test_count_refuses_a_model_without_sublayers() -> None:
    with pytest.raises(ValueError, match="at least 1 sublayer, got 0"):
        skip_count(1.0, 0)


# Which -----------------------------------------------------------------------------------------

TOY = {
    "0.attention": 0.5,
    "0.ffn": 0.875,
    "1.attention": 0.75,
    "1.ffn": 0.25,
    "2.attention": 0.75,
    "2.ffn": 0.625,
}


def test_joint_ranking() -> None:
    plan = AdaSkip().plan(profile(TOY), 1.5)
    assert plan.skipped("prefill") == (sub("0.ffn"), sub("1.attention"))
    assert plan.skipped("decode") == plan.skipped("prefill")


def test_ties_go_to_the_earlier_sublayer() -> None:
    flat = dict.fromkeys(TOY, 0.5)
    assert AdaSkip().plan(profile(flat), 2).skipped("prefill") == tuple(map(sub, TOY))[:3]


def test_a_mixer_is_ranked_like_the_others() -> None:
    hybrid = {"0.mixer": 0.5, "1.attention": 0.25, "1.ffn": 0.125, "2.mixer": 0.75}
    plan = AdaSkip().plan(profile(hybrid), 2)
    assert plan.skipped("prefill") == (sub("0.mixer"), sub("2.mixer"))
    assert set(plan.surrogates.factors) == {sub("0.mixer"), sub("1.ffn"), sub("2.mixer")}


def test_factors_of_what_is_skipped_and_of_every_ffn() -> None:
    plan = AdaSkip().plan(profile(TOY), 1.5)
    assert dict(plan.surrogates.factors) == {
        sub("0.ffn"): 0.5 + 1 / 64,
        sub("1.attention"): 0.5 + 2 / 64,
        sub("1.ffn"): 0.5 + 3 / 64,
        sub("2.ffn"): 0.5 + 5 / 64,
    }


def test_alpha_one_is_the_unchanged_model() -> None:
    assert AdaSkip().plan(profile(TOY), 1.0) == SkipPlan.empty(map(sub, TOY))


def test_alpha_is_checked() -> None:
    with pytest.raises(ValueError, match="alpha, the acceleration ratio"):
        AdaSkip().plan(profile(TOY), 0.5)


SIMILARITIES = st.lists(st.integers(-64, 64).map(lambda n: n / 64), min_size=2, max_size=12)


def names(count: int) -> list[str]:
    return [f"{n // 2}.{('attention', 'ffn')[n % 2]}" for n in range(count)]


@PROPERTY
@given(SIMILARITIES, st.floats(1, 3.9))
def test_what_is_skipped_is_the_top(values: list[float], alpha: float) -> None:
    given_names = names(len(values))
    plan = AdaSkip().plan(profile(dict(zip(given_names, values, strict=True))), alpha)
    left, expected = dict(zip(given_names, values, strict=True)), []
    for _ in range(skip_count(alpha, len(values))):
        best = next(name for name in left if left[name] == max(left.values()))
        expected.append(best)
        del left[best]
    assert {str(s) for s in plan.skipped("prefill")} == set(expected)


def test_variants_rank_by_their_own_average() -> None:
    """Sample 1 has 1 token, sample 2 has 9: the two averages prefer different sublayers."""
    cosine = np.array([[1.0, 0.5], [0.0, 1.8]])  # sums; paper 0.1, 0.23; released 0.5, 0.35
    tokens = np.array([[1.0, 1.0], [9.0, 9.0]])
    one = np.ones_like(tokens)
    measured = Profile(
        (sub("0.attention"), sub("0.ffn")),
        np.stack([cosine, one, one, one, tokens], axis=-1),
        Fingerprint("0" * 16, "toy", 1, "0" * 16),
        {},
        {},
    )
    assert AdaSkip().plan(measured, 2).skipped("prefill") == (sub("0.ffn"),)
    assert AdaSkip(variant="released").plan(measured, 2).skipped("prefill") == (sub("0.attention"),)


def test_options_are_checked() -> None:
    assert AdaSkip() == AdaSkip(window=20, variant="paper", online=True)
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        AdaSkip(window=0)
    with pytest.raises(ValueError, match=r"window must be at least 1 token, got 1\.5"):
        AdaSkip(window=cast(int, 1.5))
    with pytest.raises(ValueError, match="unknown variant 'fast': use 'paper' or 'released'"):
        AdaSkip(variant=cast(Variant, "fast"))


def test_adaskip_is_a_policy() -> None:
    policy: Policy = AdaSkip()
    assert isinstance(policy, OnlinePolicy)
    assert isinstance(policy.plan(profile(TOY), 1.5), SkipPlan)


# Online ----------------------------------------------------------------------------------------


def row(similarity: float, ratio: float = 0.75, tokens: int = 8) -> tuple[float, ...]:
    before = 16.0 * tokens
    return similarity * tokens, 99.0, before, ratio * ratio * before, tokens


def online(
    window: Sequence[Sequence[float]],
    probed: Sequence[str],
    variant: Variant = "paper",
    skip: Sequence[str] = ("0.ffn", "1.attention"),
) -> SkipPlan:
    measured = profile(TOY)
    surrogates = AdaSkip().plan(measured, 1.5).surrogates
    plan = SkipPlan.of(measured.sublayers, skip, surrogates=surrogates)
    return AdaSkip(variant=variant).online_plan(
        measured, plan, np.array(window).reshape(-1, 5), tuple(map(sub, probed))
    )


def extras(plan: SkipPlan) -> list[str]:
    return [str(s) for s in plan.skipped("decode") if s not in plan.skipped("prefill")]


def test_threshold_is_the_least_similar_of_what_is_skipped() -> None:
    measured, policy = profile(TOY), AdaSkip()
    assert policy.threshold(measured, policy.plan(measured, 1.5)) == 0.75
    assert policy.threshold(measured, policy.plan(measured, 2)) == 0.75
    assert policy.threshold(measured, policy.plan(measured, 3)) == 0.625
    assert policy.threshold(measured, policy.plan(measured, 1)) is None
    extra = SkipPlan.of(measured.sublayers, ["0.ffn"], decode_extra=["1.ffn"])
    assert policy.threshold(measured, extra) == 0.875  # decode's own set does not count


def test_threshold_refuses_another_model() -> None:
    plan = SkipPlan.of([sub("0.attention"), sub("0.ffn")], ["0.ffn"])
    with pytest.raises(ValueError, match=r"2 sublayers and the profile 6.*different models"):
        AdaSkip().threshold(profile(TOY), plan)


def test_paper_adds_above_beta_with_the_offline_scale() -> None:
    plan = online([row(0.76), row(0.74)], ["1.ffn", "2.ffn"])
    assert extras(plan) == ["1.ffn"]
    assert plan.surrogates.factor(sub("1.ffn")) == 0.5 + 3 / 64
    assert plan.skipped("prefill") == (sub("0.ffn"), sub("1.attention"))


def test_released_uses_the_windows_own_ratio() -> None:
    plan = online([row(0.74), row(0.76, ratio=0.875)], ["1.ffn", "2.ffn"], "released")
    assert extras(plan) == ["2.ffn"]
    assert plan.surrogates.factor(sub("2.ffn")) == 0.875
    assert plan.surrogates.factor(sub("1.ffn")) == 0.5 + 3 / 64  # not added: as it was


def test_variants_differ_at_equality() -> None:
    assert extras(online([row(0.75)], ["2.ffn"], "paper")) == []
    assert extras(online([row(0.75)], ["2.ffn"], "released")) == ["2.ffn"]


@pytest.mark.parametrize("variant", BOTH)
def test_no_evidence_is_not_added(variant: Variant) -> None:
    nothing = [0.0] * 5
    assert extras(online([nothing, row(0.9)], ["1.ffn", "2.ffn"], variant)) == ["2.ffn"]
    broken = [*row(0.9)[:3], math.nan, 8]
    assert extras(online([broken, row(0.9)], ["1.ffn", "2.ffn"], variant)) == ["2.ffn"]


def test_a_senseless_ratio_of_the_window_is_no_evidence() -> None:
    """Of the released variant, which would put it in; a request is not to end for that."""
    for before, after in ((0.0, 4.0), (4.0, 0.0), (1e-9, 4.0)):
        window = [[7.9, 1.0, before, after, 8], row(0.9)]
        assert extras(online(window, ["1.ffn", "2.ffn"], "released")) == ["2.ffn"]
        assert extras(online(window, ["1.ffn", "2.ffn"], "paper")) == ["1.ffn", "2.ffn"]


@pytest.mark.parametrize("variant", BOTH)
def test_no_online_step_without_a_prefill_set_or_when_off(variant: Variant) -> None:
    empty = online([row(0.99)], ["1.ffn"], variant, skip=())
    assert empty.skipped("decode") == ()
    measured = profile(TOY)
    plan = AdaSkip().plan(measured, 1.5)
    off = AdaSkip(variant=variant, online=False)
    assert off.online_plan(measured, plan, [row(0.99)], (sub("1.ffn"),)) is plan


def test_what_is_skipped_already_stays_as_it_is() -> None:
    plan = online([row(0.99)], ["0.ffn"], "released")
    assert extras(plan) == []
    assert plan.surrogates.factor(sub("0.ffn")) == 0.5 + 1 / 64


@pytest.mark.parametrize("variant", BOTH)
def test_a_factor_of_prefill_is_not_replaced(variant: Variant) -> None:
    """An ffn that only prefill skips may be added to decode; both phases then use one factor."""
    measured, ffn = profile(TOY), sub("0.ffn")
    plan = SkipPlan(measured.sublayers, {ffn: Action.SKIP}, {}, measured.scales())
    more = AdaSkip(variant=variant).online_plan(measured, plan, [row(0.99)], (ffn,))
    assert more.skipped("decode") == (ffn,)
    assert more.phase_digest("prefill") == plan.phase_digest("prefill")


def test_a_plan_without_factors_gets_them_for_its_extras() -> None:
    measured = profile(TOY)
    plan = SkipPlan.of(measured.sublayers, ["1.attention"], surrogates=NO_SURROGATES)
    more = AdaSkip().online_plan(measured, plan, [row(0.99)], (sub("2.ffn"),))
    assert dict(more.surrogates.factors) == {sub("2.ffn"): 0.5 + 5 / 64}


@pytest.mark.parametrize("variant", BOTH)
def test_something_always_runs(variant: Variant) -> None:
    """All attention is skipped and every ffn passes: the least similar ffn is kept."""
    attention = ["0.attention", "1.attention", "2.attention"]
    window, probed = [row(0.97), row(0.96), row(0.98)], ["0.ffn", "1.ffn", "2.ffn"]
    assert extras(online(window, probed, variant, skip=attention)) == ["0.ffn", "2.ffn"]
    nearly = [row(0.97), row(-0.96), row(0.98)]  # near miss: nothing is held back
    assert extras(online(nearly, probed, variant, skip=attention)) == ["0.ffn", "2.ffn"]


def test_probed_is_checked() -> None:
    for name in ("0.attention", "0.mixer"):
        with pytest.raises(ValueError, match=rf"^{name}: only ffn sublayers are added in decode"):
            online([row(0.9)], [name])
    with pytest.raises(PlanError, match=r"^9\.ffn: unknown sublayer"):
        online([row(0.9)], ["9.ffn"])
    with pytest.raises(ValueError, match="listed twice"):
        online([row(0.9), row(0.9)], ["1.ffn", "1.ffn"])
    with pytest.raises(ValueError, match=r"window must have shape \(2, 5\), got \(1, 5\)"):
        online([row(0.9)], ["1.ffn", "2.ffn"])


@PROPERTY
@given(SIMILARITIES, st.data(), st.sampled_from(BOTH))
def test_online_set_is_the_rule(values: list[float], data: st.DataObject, variant: Variant) -> None:
    """Against the rule read off the paper's table, sublayer by sublayer."""
    given_names = names(len(values))
    measured = profile(dict(zip(given_names, values, strict=True)))
    policy = AdaSkip(variant=variant)
    plan = policy.plan(measured, 1.7)
    skipped = [str(s) for s in plan.skipped("prefill")]
    probed = [name for name in given_names if name.endswith("ffn") and name not in skipped]
    seen = {name: data.draw(st.integers(-64, 64)) / 64 for name in probed}
    window = np.array([row(seen[name]) for name in probed]).reshape(-1, 5)
    more = policy.online_plan(measured, plan, window, tuple(map(sub, probed)))
    offline = dict(zip(given_names, values, strict=True))
    expected = set()
    if skipped:
        beta = min(offline[name] for name in skipped)
        expected = {n for n in probed if seen[n] > beta or (variant != "paper" and seen[n] == beta)}
    if len(expected) + len(skipped) == len(values):
        assert len(extras(more)) == len(expected) - 1
        assert set(extras(more)) < expected
    else:
        assert set(extras(more)) == expected
    assert more.skipped("prefill") == plan.skipped("prefill")
