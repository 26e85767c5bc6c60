"""Loss for a second that is saved: moves by hand on toy losses and planted times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaskip_fx
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.latency.table import LatencyTable
from adaskip_fx.latency.terms import Costs, TableError
from adaskip_fx.measurement.measure import measure
from adaskip_fx.plans.skip_plan import Action, Phase, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import TimedGreedy
from adaskip_fx.profiles.fingerprint import Fingerprint
from tests.support.compiled_llamas import make_model
from tests.support.profiles import profile

WIDE, NARROW = Window(50, 4), Window(6, 2)
NAMES = tuple(Sublayer(n, kind) for n in range(3) for kind in ("attention", "ffn"))
HEADS = {s: 2 for s in NAMES if s.kind == "attention"}
#: Seconds; the scale that stands in for a skipped sublayer costs nothing.
SECONDS = {
    **{"rest": 1.0, "attention": 10.0, "ffn": 4.0, "scale": 0.0, "attention, heads apart": 0.0},
    **{"attention, window 4+50": 6.0, "attention, window 2+6": 2.0},
}


def table(**changes: float) -> LatencyTable:
    costs = tuple(Costs(phase, 100, {**SECONDS, **changes}) for phase in ("prefill", "decode"))
    heads = tuple(HEADS.get(s, 0) for s in NAMES)
    about = Fingerprint("a" * 16, "llama", 1, "b" * 16)
    return LatencyTable(about, {}, NAMES, tuple(s.kind for s in NAMES), costs, heads)


def seconds(plan: SkipPlan) -> float:
    """By hand, of the plans here."""
    total = 1.0
    for sublayer in NAMES:
        if plan.action("decode", sublayer) is Action.RUN:
            window = plan.windows.decode.get(sublayer)
            whole = {"attention": 10.0, "ffn": 4.0}[sublayer.kind]
            share = 0.0 if window is None else 1 - len(window.full_heads) / 2
            seen = {WIDE.tokens: 6.0, NARROW.tokens: 2.0}[window.tokens] if window else 0.0
            total += (1 - share) * whole + share * seen
    return total


class Toy:
    """The sum of what is lost by each sublayer skipped, or head with a window."""

    def __init__(self, skip: list[float], wide: list[float], narrow: list[float]) -> None:
        self.skip = dict(zip(NAMES, skip, strict=True))
        self.lost = {WIDE.tokens: wide, NARROW.tokens: narrow}
        self.extra: Callable[[SkipPlan], float] = lambda plan: 0.0
        self.samples: set[int | None] = set()

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        self.samples.add(samples)
        total = sum(self.skip[s] for s in plan.decode)
        for sublayer, window in plan.windows.decode.items():
            share = 1 - len(window.full_heads) / 2
            total += share * self.lost[window.tokens][sublayer.layer]
        return total + self.extra(plan)


#: For a second, lost by: ffns 1, 2 and 3; wide windows 0.25, 1.5 and 5; narrow ones 1, 2 and 9.
TOY = ([90.0, 4.0, 90.0, 8.0, 90.0, 12.0], [1.0, 6.0, 20.0], [8.0, 16.0, 72.0])


def moves(plans: tuple[SkipPlan, ...]) -> list[str]:
    """What each plan has that the one before had not."""
    said, before = list[str](), plans[0]
    for plan in plans[1:]:
        said += [f"skip {s}" for s in plan.decode if s not in before.decode]
        for sublayer, window in plan.windows.decode.items():
            if before.windows.decode.get(sublayer) != window:
                said.append(f"{sublayer} {window}")
        assert before <= plan, "nothing comes back"
        before = plan
    return said


def test_the_cheapest_seconds_first() -> None:
    """The narrow window of layer 0 loses 7 more than the wide one and saves 4 more: 1.75."""
    policy = TimedGreedy(Toy(*TOY), table(), 100, heads=HEADS, windows=(WIDE, NARROW), samples=3)
    plans = policy.plans(profile(3), 2.0)
    assert moves(plans) == [
        "0.attention window 4+50",
        "skip 0.ffn",
        "1.attention window 4+50",
        "0.attention window 2+6",
        "skip 1.ffn",
        "1.attention window 2+6",
    ]
    assert seconds(plans[0]) / seconds(plans[-1]) >= 2.0 > seconds(plans[0]) / seconds(plans[-2])
    assert policy.describe(plans[-1]) == "predicted: 2.26x at 100 tokens"
    assert isinstance(policy.evaluator, Toy)
    assert policy.evaluator.samples == {3}


def test_single_heads() -> None:
    policy = TimedGreedy(
        Toy(*TOY), table(), 100, heads=HEADS, windows=(NARROW,), per="head", skip=()
    )
    plans = policy.plans(profile(3), 1.5)
    assert moves(plans) == [
        "0.attention window 2+6 (K/V heads 1 full)",
        "0.attention window 2+6",
        "1.attention window 2+6 (K/V heads 1 full)",
        "1.attention window 2+6",
    ]


def test_what_is_lost_together_is_seen() -> None:
    toy = Toy(*TOY)
    both = {NAMES[0], NAMES[2]}
    toy.extra = lambda plan: 50.0 if both <= set(plan.windows.decode) else 0.0
    policy = TimedGreedy(toy, table(), 100, heads=HEADS, windows=(WIDE,), skip=("ffn",))
    assert "1.attention window 4+50" not in moves(policy.plans(profile(3), 1.4))


def test_a_window_that_saves_nothing_is_left_out() -> None:
    """Its loss does not matter: a table says that it is slower."""
    slow = table(**{"attention, window 4+50": 11.0})
    policy = TimedGreedy(Toy(*TOY), slow, 100, heads=HEADS, windows=(WIDE,))
    assert not policy.plan(profile(3), 1.3).windows
    only = TimedGreedy(Toy(*TOY), slow, 100, heads=HEADS, windows=(WIDE,), skip=())
    with pytest.raises(ValueError, match=r"alpha 1\.1 cannot be met at 100 tokens: no move"):
        only.plan(profile(3), 1.1)


LOSSES = st.lists(st.floats(0, 100), min_size=3, max_size=3)


@given(st.lists(st.floats(0, 100), min_size=6, max_size=6), LOSSES, LOSSES, st.floats(1, 8.5))
def test_it_is_fast_enough_and_no_faster(
    skip: list[float], wide: list[float], narrow: list[float], alpha: float
) -> None:
    policy = TimedGreedy(
        Toy(skip, wide, narrow), table(), 100, heads=HEADS, windows=(WIDE, NARROW), shortlist=2
    )
    plans = policy.plans(profile(3), alpha)
    speed = [seconds(plans[0]) / seconds(plan) for plan in plans]
    assert speed[-1] >= alpha * (1 - 1e-9)
    assert all(s < alpha for s in speed[:-1])
    assert speed == sorted(speed)
    moves(plans)


def test_on_a_model() -> None:
    model = make_model("three_layers")
    compiled = adaskip_fx.compile(model, plan=SkipPlan.empty(NAMES), backend="eager")

    def clock(phase: Phase, context: int, plan: SkipPlan) -> float:
        return seconds(plan)

    found = measure(compiled, (100,), time_step=clock, windows=[NARROW])
    texts = [torch.randint(0, 61, (1, 100), generator=torch.Generator().manual_seed(1))]
    loss = CalibrationLoss(compiled, texts)
    policy = TimedGreedy(loss, found, 100, heads=loss.kv_heads, windows=(NARROW,))
    similar = adaskip_fx.calibrate(model, _Tokens(), ["a" * 60], 64)
    fast = adaskip_fx.compile(model, similar, alpha=1.5, policy=policy, backend="eager")
    plan = fast.adaskip.plan
    assert isinstance(plan, SkipPlan)
    assert seconds(SkipPlan.empty(NAMES)) / seconds(plan) >= 1.5
    other = make_model("grouped")
    with pytest.raises(TableError, match="the table is of the model"):
        policy.check(other)


class _Tokens:
    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(c) % 61 for c in text]])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ({"per": "token"}, "per is 'head' or 'layer', got 'token'"),
        ({"windows": (Window(4, 0, (1,)),)}, "give windows without full_heads"),
        ({"skip": (), "windows": ()}, "nothing may be skipped and nothing may get a window"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimedGreedy(Toy(*TOY), table(), 100, **{"heads": HEADS, "windows": (WIDE,), **options})


@pytest.mark.parametrize("alpha", [0.5, float("nan"), float("inf")])
def test_alphas_that_mean_nothing(alpha: float) -> None:
    policy = TimedGreedy(Toy(*TOY), table(), 100)
    with pytest.raises(ValueError, match="alpha must be at least 1"):
        policy.plan(profile(3), alpha)
