"""Budgets by measured time: the knapsack and the policy, against all subsets tried one by one.

And `compile` with it, with tables that were made up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaskip_fx
from adaskip_fx import api
from adaskip_fx.contrib.routing import Route, Router
from adaskip_fx.latency.knapsack import choose
from adaskip_fx.latency.table import LatencyTable, device_name
from adaskip_fx.latency.terms import Costs, TableError, Weights
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import POP, AdaSkip, DecodeOnly, LatencyBudget, OnlinePolicy
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.profiles.profile import Fingerprint, Profile
from tests.support import compiled_llamas
from tests.support.eager_reference import assert_close

FINGERPRINT = Fingerprint("0" * 16, "toy", 1, "0" * 16)
PREFILL = {"rest": 1.0, "attention": 4.0, "ffn": 2.0, "scale": 0.25}
DECODE = {"rest": 3.0, "attention": 1.0, "ffn": 2.0, "scale": 0.0}


def sublayers(layers: int) -> tuple[Sublayer, ...]:
    return tuple(Sublayer(i, kind) for i in range(layers) for kind in ("attention", "ffn"))


def profile(similarity: Sequence[float], scale: float = 0.75) -> Profile:
    rows = [(4 * c, 4 * scale, 4.0, 4 * scale**2, 4) for c in similarity]
    return Profile(sublayers(len(rows) // 2), np.array([rows]), FINGERPRINT, {}, {})


def table(
    layers: int,
    prefill: dict[str, float] = PREFILL,
    decode: dict[str, float] = DECODE,
    fixed: Collection[str] = (),
) -> LatencyTable:
    """Costs at 100 tokens; sublayers in `fixed` cannot be skipped."""
    names = sublayers(layers)
    classes = tuple("" if str(s) in fixed else s.kind for s in names)
    costs = (Costs("prefill", 100, prefill), Costs("decode", 100, decode))
    return LatencyTable(FINGERPRINT, {}, names, classes, costs)


# The knapsack. ---------------------------------------------------------------------------------

Choice = tuple[list[int], list[tuple[int, ...]], list[int], bool]


@st.composite
def knapsacks(draw: st.DrawFn, kinds: int = 3, most: int = 8) -> Choice:
    """Losses [items], savings [items, needs], needs, whether one must be left: small integers."""
    width = draw(st.integers(1, 2))
    number = st.integers(-3, 9)
    distinct = [tuple(draw(number) for _ in range(width)) for _ in range(kinds)]
    savings = draw(st.lists(st.sampled_from(distinct), min_size=1, max_size=most))
    losses = [draw(st.integers(-2, 9)) for _ in savings]
    needs = [draw(st.integers(-2, 30)) for _ in range(width)]
    return losses, savings, needs, draw(st.booleans())


def fits(chosen: Collection[int], choice: Choice) -> bool:
    losses, savings, needs, leave_one = choice
    sums = [sum(savings[i][k] for i in chosen) for k in range(len(needs))]
    room = len(chosen) <= len(losses) - leave_one
    return room and all(s >= n for s, n in zip(sums, needs, strict=True))


def least_loss(choice: Choice) -> int | None:
    """By trying every subset; None if none fits."""
    losses = choice[0]
    every = (c for n in range(len(losses) + 1) for c in combinations(range(len(losses)), n))
    return min((sum(losses[i] for i in c) for c in every if fits(c, choice)), default=None)


def chosen_by(choice: Choice) -> list[int] | None:
    losses, savings, needs, leave_one = choice
    try:
        return choose(losses, savings, needs, leave_one=leave_one)
    except ValueError:
        return None


@given(st.one_of(knapsacks(), knapsacks(kinds=8)))
def test_no_subset_loses_less(choice: Choice) -> None:
    chosen, least = chosen_by(choice), least_loss(choice)
    assert (chosen is None) == (least is None)
    if chosen is not None:
        assert fits(chosen, choice)
        assert sum(choice[0][i] for i in chosen) == least


def test_the_oracle_tells_a_worse_choice() -> None:
    """What a greedy choice (the most saved for the loss) takes is worse, and is seen to be."""
    choice: Choice = ([10, 6, 6], [(10,), (5,), (5,)], [10], False)
    assert chosen_by(choice) == [0]
    assert least_loss(choice) == 10 < sum(choice[0][i] for i in (1, 2))
    assert fits((1, 2), choice)
    assert not fits((1,), choice)


def test_ties_go_to_fewer_items_and_to_the_first() -> None:
    assert choose([0, 0, 0], [[5], [5], [5]], [5]) == [0]
    assert choose([0, 0, 0], [[1], [2], [3]], [3]) == [2]
    assert choose([1, 1], [[1], [1]], [0]) == []


def test_one_is_left_even_if_all_are_free() -> None:
    assert choose([0, 0], [[1], [2]], [2]) == [1]
    with pytest.raises(ValueError, match="no choice reaches the needs"):
        choose([0, 0], [[1], [2]], [3])
    assert choose([0, 0], [[1], [2]], [3], leave_one=False) == [0, 1]


def test_sixty_four_sublayers_that_all_differ() -> None:
    """Too many for trying: the loss is within a hundredth of what fractions would lose."""
    draw = np.random.default_rng(0)
    losses, savings = draw.uniform(0.1, 1, 64), draw.uniform(1, 2, (64, 1))
    need = savings.sum() / 4
    chosen = choose(losses.tolist(), savings, [need])
    assert savings[chosen].sum() >= need
    bound = left = 0.0  # of the relaxed problem: items by loss a saving, the last one cut
    for i in np.argsort(losses / savings[:, 0]):
        part = min(1.0, (need - left) / savings[i, 0])
        bound, left = bound + part * losses[i], left + part * savings[i, 0]
    assert bound <= losses[chosen].sum() <= 1.01 * bound


# The policy. -----------------------------------------------------------------------------------

SIMILAR = [0.5, 0.9, 0.95, 0.7, 0.99, 0.8]
LOST = dict(zip(sublayers(3), (1 - c for c in SIMILAR), strict=True))
PHASES: list[Weights] = ["prefill", "decode", {"prefill": 1, "decode": 3}]


def seconds(
    skip: Collection[Sublayer], phase: str, layers: int = 3, together: bool = False
) -> float:
    """Added up by hand from the costs above; together: neighbours are scaled once."""
    costs = PREFILL if phase == "prefill" else DECODE
    runs = sum(costs[s.kind] for s in sublayers(layers) if s not in skip)
    pairs = zip(sublayers(layers), sublayers(layers)[1:], strict=False)
    saved = sum(a in skip and b in skip for a, b in pairs) if together else 0
    return costs["rest"] + runs + costs["scale"] * (len(skip) - saved)


def speed_up(
    skip: Collection[Sublayer], phase: Weights, layers: int = 3, together: bool = False
) -> float:
    weights = {phase: 1.0} if isinstance(phase, str) else phase
    before, after = (
        sum(w * seconds(s, name, layers, together) for name, w in weights.items())
        for s in ((), skip)
    )
    return before / after


def by_hand(alpha: float, constraints: Sequence[Weights]) -> tuple[float, set[Sublayer]]:
    """The least loss of all plans of three layers that are fast enough, and one that has it."""
    every = (set(c) for n in range(6) for c in combinations(sublayers(3), n))
    fast = (c for c in every if all(speed_up(c, p) >= alpha - 1e-9 for p in constraints))
    return min(((sum(LOST[s] for s in c), c) for c in fast), key=lambda pair: pair[0])


@given(st.floats(1.0, 2.1), st.sampled_from(["both", *PHASES]))
def test_the_plan_is_fast_enough_and_keeps_the_most(alpha: float, phase: Weights) -> None:
    constraints: list[Weights] = ["prefill", "decode"] if phase == "both" else [phase]
    budget = LatencyBudget(table(3), 100, phase)
    plan = budget.plan(profile(SIMILAR), alpha)
    skip = plan.skipped("prefill")
    assert plan.skipped("decode") == skip
    for constraint in constraints:
        predicted = budget.table.predict(plan, constraint, 100)
        assert predicted >= alpha - 1e-9
        assert predicted == pytest.approx(speed_up(skip, constraint, together=True), rel=1e-12)
    # An alpha that a plan meets but for rounding may be met by it or by the next.
    least, most = (by_hand(a, constraints)[0] for a in (alpha, alpha + 2e-9))
    assert least - 1e-12 <= sum(LOST[s] for s in skip) <= most + 1e-12


def test_what_is_dear_in_one_phase_goes_for_that_phase() -> None:
    """Attention is the most of a prefill, FFN of a decode step: one sublayer each is enough."""
    one = {}
    for phase in ("prefill", "decode"):
        plan = LatencyBudget(table(3), 100, phase).plan(profile([0.9] * 6), 1.18)
        one[phase] = [str(s) for s in plan.skipped("prefill")]
    assert one == {"prefill": ["0.attention"], "decode": ["0.ffn"]}


@given(st.permutations([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), st.sampled_from([2, 4 / 3, 8]))
def test_where_all_cost_the_same_it_is_the_paper(similarity: list[float], alpha: float) -> None:
    """Nothing but equal sublayers: alpha in time is alpha in sublayers."""
    same = {"rest": 0.0, "attention": 1.0, "ffn": 1.0, "scale": 0.0}
    measured = profile(similarity)
    budget = LatencyBudget(table(4, same, same), 100)
    assert budget.plan(measured, alpha) == AdaSkip().plan(measured, alpha)
    dearer = LatencyBudget(table(4, {**same, "rest": 4.0}, same), 100, "prefill")
    if alpha != 8:  # a third of the time is no sublayer's: more of them have to go
        assert len(dearer.plan(measured, alpha).prefill) > len(budget.plan(measured, alpha).prefill)


def test_alpha_of_one_skips_nothing() -> None:
    assert LatencyBudget(table(3), 100).plan(profile(SIMILAR), 1.0) == SkipPlan.empty(sublayers(3))


def test_scales_as_adaskip_gives_them() -> None:
    plan = LatencyBudget(table(3), 100).plan(profile(SIMILAR), 1.3)
    skipped = plan.skipped("prefill")
    assert skipped
    assert plan == AdaSkip().plan_of(profile(SIMILAR), skipped)
    assert plan.surrogates.factor(skipped[0]) == 0.75


def test_losses_of_the_caller() -> None:
    """An attention that the similarities would keep."""
    losses = {s: 0.0 if str(s) == "0.attention" else 1.0 for s in sublayers(3)}
    named = [
        [str(s) for s in policy.plan(profile(SIMILAR), 1.2).skipped("prefill")]
        for policy in (
            LatencyBudget(table(3), 100, "prefill", losses),
            LatencyBudget(table(3), 100, "prefill"),
        )
    ]
    assert named[0] == ["0.attention"] != named[1]


def test_what_cannot_be_skipped_is_not() -> None:
    """The most similar sublayer is fixed; all others may go, since it runs."""
    reach = 19 / (1 + 4 + 5 * 0.25)
    wide = {**PREFILL, "rest": PREFILL["rest"] + 4}  # the fixed one is part of the rest
    fixed = LatencyBudget(table(3, wide, fixed=["2.attention"]), 100, "prefill")
    plan = fixed.plan(profile(SIMILAR), reach - 1e-9)
    assert [str(s) for s in sublayers(3) if s not in plan.skipped("prefill")] == ["2.attention"]
    with pytest.raises(ValueError, match=rf"the best possible is {reach:.3g}x \(prefill\)"):
        fixed.plan(profile(SIMILAR), reach + 0.01)


def test_it_learns_online_as_adaskip_does() -> None:
    base = AdaSkip(window=7, variant="released")
    budget = LatencyBudget(table(3), 100, base=base)
    assert isinstance(budget, OnlinePolicy)
    assert (budget.window, budget.online) == (7, True)
    assert not LatencyBudget(table(3), 100, base=AdaSkip(online=False)).online
    measured = profile(SIMILAR)
    plan = budget.plan(measured, 1.2)
    probed = tuple(s for s in sublayers(3) if s.kind == "ffn" and s not in plan.prefill)
    window = [[4 * 0.999, 4.0, 4.0, 4.0, 4]] * len(probed)
    assert probed
    learned = budget.online_plan(measured, plan, window, probed)
    assert learned == base.online_plan(measured, plan, window, probed) != plan


def test_what_it_left_running_is_not_added_for_being_as_similar_as_before() -> None:
    """Attention of little similarity is skipped because it costs much; beta is low then."""
    similar = [0.5, 0.9, 0.5, 0.8, 0.5, 0.7]
    losses = {s: float(s.kind == "ffn") for s in sublayers(3)}
    budget = LatencyBudget(table(3), 100, "prefill", losses)
    measured = profile(similar)
    plan = budget.plan(measured, 1.2)
    probed = tuple(s for s in sublayers(3) if s.kind == "ffn")
    assert [s.kind for s in plan.prefill] == ["attention"]

    def added(policy: OnlinePolicy, window: Sequence[float]) -> list[str]:
        moments = [[4 * c, 3.0, 4.0, 2.25, 4] for c in window]
        learned = policy.online_plan(measured, plan, moments, probed)
        return [str(s) for s in learned.decode if s not in plan.decode]

    assert added(AdaSkip(), [0.9, 0.8, 0.7]) == ["0.ffn", "1.ffn", "2.ffn"]
    assert added(budget, [0.9, 0.8, 0.7]) == []
    assert added(budget, [0.91, 0.8, 0.95]) == ["0.ffn", "2.ffn"]
    with pytest.raises(PlanError, match=r"9\.ffn"):
        budget.online_plan(measured, plan, [[4.0, 3.0, 4.0, 2.25, 4]], (Sublayer(9, "ffn"),))


@given(
    st.lists(st.sampled_from([0.5, 0.7, 0.9]), min_size=6, max_size=6),
    st.lists(st.sampled_from([0.4, 0.6, 0.8, 1.0]), min_size=3, max_size=3),
    st.sampled_from([1.2, 1.5, 2.0]),
)
def test_on_a_plan_of_the_most_similar_it_learns_what_adaskip_does(
    similar: list[float], window: list[float], alpha: float
) -> None:
    measured, base = profile(similar), AdaSkip()
    plan = base.plan(measured, alpha)
    probed = [s for s in sublayers(3) if s.kind == "ffn" and s not in plan.prefill]
    moments = [[4 * window[s.layer], 3.0, 4.0, 2.25, 4] for s in probed]
    given = (measured, plan, np.array(moments).reshape(-1, 5), tuple(probed))
    budget = LatencyBudget(table(3), 100, "prefill")
    assert budget.online_plan(*given) == base.online_plan(*given)


# What it refuses. ------------------------------------------------------------------------------


def refusal(policy: LatencyBudget, alpha: float, measured: Profile | None = None) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        policy.plan(measured or profile(SIMILAR), alpha)
    return str(caught.value)


def test_out_of_reach() -> None:
    """One sublayer must run: of both phases the best that skipping the other five can do."""
    best = [19 / (19 - 3 * 3.75 - 2 * 1.75), 12 / (12 - 3 * 2 - 2 * 1)]
    assert refusal(LatencyBudget(table(3), 100), 9) == (
        "alpha 9 cannot be met at 100 tokens: with every sublayer skipped that can be, the best "
        f"possible is {best[0]:.3g}x (prefill) and {best[1]:.3g}x (decode); take a smaller alpha"
    )
    request = LatencyBudget(table(3), 100, {"prefill": 1, "decode": 2})
    assert re.search(r"is [0-9.]+x \(1 prefill \+ 2 decode\); take", refusal(request, 9))
    reachable = LatencyBudget(table(3), 100, "prefill").plan(profile(SIMILAR), best[0] - 1e-9)
    assert len(reachable.prefill) == 5


def test_a_compensation_that_was_not_measured() -> None:
    plain = {name: cost for name, cost in PREFILL.items() if name != "scale"}
    message = "the cost of 'scale' was not measured (known: attention, ffn, rest); measure again"
    assert message in refusal(LatencyBudget(table(3, plain), 100, "prefill"), 1.2)


def test_arguments() -> None:
    budget = LatencyBudget(table(3), 100)
    for alpha in (0.9, float("nan"), float("inf"), True, "2"):
        message = refusal(budget, alpha)  # type: ignore[arg-type]
        assert message.startswith("alpha, the speed-up, must be a number of at least 1")
    assert "they are of different models" in refusal(budget, 1.2, profile([0.5] * 4))
    assert "prefill at 50 tokens: measured were 100; measure again" in refusal(
        LatencyBudget(table(3), 50), 1.2
    )
    partial = LatencyBudget(table(3), 100, losses={Sublayer(0, "ffn"): 1.0})
    assert refusal(partial, 1.2) == ("losses has none for 0.attention: give one for each sublayer")
    for phase in ("extend", {}, {"prefill": 0}, {"decode": -1}, {"other": 1}):
        with pytest.raises(ValueError, match="phase must be 'prefill', 'decode' or how often"):
            LatencyBudget(table(3), 100, phase)  # type: ignore[arg-type]
    found = table(3)
    windows = Windows.of([s for s in found.sublayers if s.kind == "attention"][:1], Window(9))
    plan = SkipPlan.empty(found.sublayers).with_windows(windows)
    with pytest.raises(TableError, match=r"cost of 'attention.*, window 4\+9' was not measured"):
        found.predict(plan, "decode", 100)
    with pytest.raises(TableError):
        table(3, {"rest": 1.0, "ffn": 1.0})


# compile(policy=LatencyBudget(...)) -----------------------------------------------------------


def bank_table(**changes: Any) -> LatencyTable:
    """Made-up costs of the bank's three-layer model, on this device."""
    model = compiled_llamas.entry("three_layers").model
    about = {"device": device_name(model), "dtype": "float32"}
    given_: dict[str, Any] = {"fingerprint": fingerprint(model), "conditions": about, **changes}
    return dataclasses.replace(table(3), **given_)


def bank_profile() -> Profile:
    model = compiled_llamas.entry("three_layers").model
    return dataclasses.replace(profile(SIMILAR), fingerprint=fingerprint(model))


def compiled(alpha: float = 1.3, **options: Any) -> Any:
    model = compiled_llamas.entry("three_layers").model
    return adaskip_fx.compile(model, bank_profile(), alpha, backend="eager", **options)


def test_compile_takes_it() -> None:
    policy = LatencyBudget(bank_table(), 100, base=AdaSkip(window=3))
    runtime = runtime_of(compiled(policy=policy))
    assert runtime.plan == LatencyBudget(table(3), 100).plan(profile(SIMILAR), 1.3)
    assert runtime.plan != AdaSkip().plan(profile(SIMILAR), 1.3)
    assert runtime.policy.window == 3
    skip = runtime.plan.skipped("prefill")
    prefill, decode = (f"{speed_up(skip, phase):.3g}x" for phase in PHASES[:2])
    line = f"policy budget: prefill {prefill}, decode {decode} predicted at 100 tokens"
    assert line in " ".join(str(runtime).split())
    assert runtime.profile is not None


def test_compile_warns_of_times_that_did_not_add_up() -> None:
    first, second = bank_table().costs
    noisy = bank_table(costs=(first, dataclasses.replace(second, error=0.071)))
    message = "the sum of cost terms is off by 7.1% in decode at 100 tokens, so that speed-ups may"
    with pytest.warns(UserWarning, match=message) as caught:
        compiled(policy=LatencyBudget(noisy, 100))
    assert [Path(w.filename).name for w in caught] == ["test_latency_budget.py"]


def test_the_compiled_model_answers_and_learns() -> None:
    """As any other policy's: the plan runs, and the window adds FFN sublayers to it."""
    fast = compiled(policy=LatencyBudget(bank_table(), 100, base=AdaSkip(window=2)))
    plan = fast.adaskip.plan
    oracle = compiled_llamas.entry("three_layers").oracle
    ids = compiled_llamas.entry("three_layers").tokens(1, 9)
    with torch.no_grad():
        compiled_llamas.follow(oracle, plan)
        try:
            expected = oracle.step(ids, compiled_llamas.entry("three_layers").reference_cache())[
                :, -1:
            ]
        finally:
            oracle.behave({})
        out = fast(input_ids=ids, logits_to_keep=1)
    assert_close(out.logits, expected, 1e-5, "logits")
    with torch.no_grad():
        for _ in range(3):
            fast(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert out.past_key_values.request.window.closed


@pytest.mark.parametrize(
    ("alpha", "context", "message"),
    [
        (99.0, 100, "alpha 99 cannot be met at 100 tokens"),
        (1.3, 50, "prefill at 50 tokens: measured were 100"),
    ],
)
def test_what_compile_refuses(alpha: float, context: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(alpha, policy=LatencyBudget(bank_table(), context))


def test_a_table_of_another_device_or_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is captured, but for a plan that was made with it on purpose."""
    other = LatencyBudget(bank_table(conditions={"device": "Some GPU", "dtype": "float32"}), 100)
    alien = LatencyBudget(bank_table(fingerprint=FINGERPRINT), 100)
    route = Route("prose", bank_profile(), (0.0,))
    with monkeypatch.context() as patch:
        patch.setattr(api, "build", lambda *_, **__: pytest.fail("captured"))
        with pytest.raises(TableError, match="measured with device Some GPU, but the model has"):
            compiled(policy=other)
        with pytest.raises(TableError, match=r"the table is of the model .*, not "):
            compiled(policy=alien)
        for wrapped in (DecodeOnly(other), POP(other), Router((route,), other)):
            with pytest.raises(TableError, match="measured with device Some GPU"):
                compiled(policy=wrapped)
    fine = DecodeOnly(LatencyBudget(bank_table(), 100))  # the companion
    assert compiled(policy=fine).adaskip.plan == fine.plan(profile(SIMILAR), 1.3)
    on_purpose = other.plan(bank_profile(), 1.3)
    assert compiled(plan=on_purpose).adaskip.plan == on_purpose
