"""Windows by loss: what is chosen and when it is enough, by hand on toy losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adaskip_fx
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import Windowed
from tests.support.compiled_llamas import make_model
from tests.support.profiles import profile

ATTENTION = [Sublayer(n, "attention") for n in range(3)]
HEADS = dict.fromkeys(ATTENTION, 2)
NARROW = Window(6, 2)


def windowed_heads(plan: SkipPlan) -> set[tuple[int, int]]:
    """(layer, head) of those that have a window; both phases have the same."""
    assert plan.windows.prefill == plan.windows.decode
    assert not plan.decode
    found = set()
    for sublayer, window in plan.windows.decode.items():
        assert (window.tokens, window.sinks) == (6, 2)
        found |= {(sublayer.layer, h) for h in range(2) if h not in window.full_heads}
    return found


class Toy:
    """A loss of single heads, and more where two have windows together."""

    def __init__(self, costs: list[float], pairs: dict[Any, float] | None = None) -> None:
        places = [(layer, head) for layer in range(3) for head in range(2)]
        self.costs, self.pairs = dict(zip(places, costs, strict=True)), pairs or {}
        self.asked: list[int | None] = []

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        self.asked.append(samples)
        heads = windowed_heads(plan)
        together = sum(c for pair, c in self.pairs.items() if heads >= set(pair))
        return sum(self.costs[h] for h in heads) + together


COSTS = [3.0, 1.0, 9.0, 2.0, 5.0, 4.0]


def test_heads_in_the_order_of_their_losses() -> None:
    """Six heads read 16 tokens each, one with a window 8: alpha 96 / (96 - 8 n)."""
    toy = Toy(COSTS)
    policy = Windowed(toy, HEADS, NARROW, context=16, samples=3)
    plans = policy.plans(profile(3), 96 / 72)
    assert [windowed_heads(p) for p in plans] == [
        set(),
        {(0, 1)},
        {(0, 1), (1, 1)},
        {(0, 1), (1, 1), (0, 0)},
    ]
    assert [policy.alpha_of(p) for p in plans] == [1, 96 / 88, 96 / 80, 96 / 72]
    assert toy.asked == [3] * 6
    assert policy.plan(profile(3), 1.0).windows.sublayers == ()
    assert len(windowed_heads(policy.plan(profile(3), 2.0))) == 6


def test_whole_layers() -> None:
    policy = Windowed(Toy(COSTS), HEADS, NARROW, context=16, per="layer")
    plan = policy.plan(profile(3), 1.2)
    assert windowed_heads(plan) == {(0, 0), (0, 1)}
    assert plan.windows.decode == {ATTENTION[0]: NARROW}


def test_a_shortlist_sees_what_is_lost_together() -> None:
    """After (0, 1), the cheapest alone costs 7 more beside it."""
    toy = Toy(COSTS, {((0, 1), (1, 1)): 7.0})
    alone = Windowed(toy, HEADS, NARROW, context=16)
    together = Windowed(toy, HEADS, NARROW, context=16, shortlist=2)
    assert windowed_heads(alone.plan(profile(3), 1.2)) == {(0, 1), (1, 1)}
    assert windowed_heads(together.plan(profile(3), 1.2)) == {(0, 1), (0, 0)}


@given(st.permutations(range(6)), st.floats(1, 2))
def test_it_is_the_least_number_that_is_enough(order: list[int], alpha: float) -> None:
    policy = Windowed(Toy([float(o) for o in order]), HEADS, NARROW, context=16)
    plans = policy.plans(profile(3), alpha)
    reads = [sum(8 if h in windowed_heads(p) else 16 for h in Toy(COSTS).costs) for p in plans]
    assert 96 / reads[-1] >= alpha
    assert all(96 / read < alpha for read in reads[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortlist": 0}, "Windowed: shortlist must be at least 1, got 0"),
        ({"per": "token"}, "Windowed: per is 'head' or 'layer', got 'token'"),
        ({"heads": {}}, "Windowed: there is no attention that can have a window"),
        ({"window": Window(4, 0, (1,))}, "Windowed: it chooses the heads; give a window without"),
        ({"context": 8}, r"Windowed: a window 2\+6 sees all of 8 tokens; take a longer context"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    given_options = {"heads": HEADS, "window": NARROW, "context": 16, **options}
    with pytest.raises(ValueError, match=message):
        Windowed(Toy(COSTS), **given_options)


@pytest.mark.parametrize("alpha", [0.9, 2.1, float("nan")])
def test_alphas_that_windows_do_not_give(alpha: float) -> None:
    policy = Windowed(Toy(COSTS), HEADS, NARROW, context=16)
    message = r"alpha must be from 1 to 2, which is what a window 2\+6 in all of 6 K/V heads gives"
    with pytest.raises(ValueError, match=message):
        policy.plan(profile(3), alpha)


def test_on_a_model() -> None:
    """Chosen are the heads that lose least alone, judged here one by one."""
    model = make_model("grouped")
    torch.manual_seed(0)
    texts = [torch.randint(0, 61, (1, 40))]
    loss = CalibrationLoss(model, texts, [(texts[0][:, :30], texts[0][:, 30:32])], backend="eager")
    assert list(loss.kv_heads.values()) == [2, 2]
    policy = Windowed(loss, loss.kv_heads, Window(5, 1), context=40)
    chosen = policy.plan(profile(2, model=model), 1.3)
    assert policy.alpha_of(chosen) >= 1.3
    losses = {}
    for sublayer in loss.kv_heads:
        for head in (0, 1):
            one = Windows.of({sublayer: Window(5, 1, (1 - head,))})
            losses[sublayer, head] = loss(SkipPlan.empty(chosen.sublayers).with_windows(one))
    best, second, *_ = sorted(losses, key=lambda unit: losses[unit])
    windows = chosen.windows.decode.items()
    assert {(s, h) for s, w in windows for h in (0, 1) if h not in w.full_heads} == {best, second}
    fast = adaskip_fx.compile(model, plan=chosen, backend="eager")
    assert fast.adaskip.kv_heads == loss.kv_heads
