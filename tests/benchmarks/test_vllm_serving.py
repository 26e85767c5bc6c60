"""The plans and the table of `benchmarks run vllm`; the engines themselves want vLLM."""

from __future__ import annotations

from typing import Any

from adaskip_fx.plans.skip_plan import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.serving.static_plan import static_plan
from benchmarks import vllm_serving
from benchmarks.vllm_serving.contender import PLANS, Load, plan
from benchmarks.vllm_serving.running import timed

LOAD = Load(2, 64, 4, 16, 32, 12, 1, "float32")


def test_plans_skip_what_their_alpha_says_and_are_one_for_both_phases() -> None:
    """24 sublayers: floor(24 (1 - 1/alpha) + 1/2) go, never of the first or the last layer."""
    found = {name: plan(name, LOAD) for name in PLANS}
    assert plan("stock", LOAD) is None
    counts = {name: len(p.prefill) for name, p in found.items() if p is not None}
    assert list(counts.values()) == [0, 4, 6, 0]
    for made in found.values():
        assert made is not None
        assert static_plan(made) == made
        assert not {s.layer for s in made.prefill} & {0, 11}
    last = found["half of the layers windowed"]
    assert last is not None
    windowed = {Sublayer(i, "attention"): Window(16, 0) for i in (1, 3, 5, 7, 9, 11)}
    assert dict(last.windows.decode) == windowed


class Counted:
    """A contender on a machine that gets slower with every turn of two."""

    def __init__(self, name: str, turns: list[str], share: float) -> None:
        self.described = {"plan": name, "skipped": 3, "room": 10 / share}
        self._name, self._turns, self._share = name, turns, share

    def round(self) -> dict[str, float]:
        self._turns.append(self._name)
        busy = float((len(self._turns) + 1) // 2)
        return {
            **{"seconds": self._share * busy, "processor": self._share},
            **{"first_token": 0.1 * busy, "first_token_processor": 0.1},
        }

    def stop(self) -> None:
        self._turns.append(f"{self._name} stopped")


def _timed(groups: list[list[str]]) -> tuple[list[str], dict[str, Any]]:
    turns: list[str] = []
    shares = {"stock": 1.0, "half": 0.5}
    found = timed(groups, lambda name: Counted(name, turns, shares[name]), 3)
    return turns, found


def test_contenders_of_a_group_take_turns() -> None:
    turns, _ = _timed([["stock", "half"]])
    assert turns[:2] == ["stock", "half"]  # not counted
    assert turns[2:8] == ["stock", "half", "half", "stock", "stock", "half"]
    assert turns[8:] == ["stock stopped", "half stopped"]
    turns, _ = _timed([["stock"], ["half"]])
    assert turns == ["stock"] * 4 + ["stock stopped"] + ["half"] * 4 + ["half stopped"]


def test_rounds_of_one_turn_are_compared() -> None:
    """A machine that gets slower and slower changes the rates, not how they compare."""
    _, found = _timed([["stock", "half"]])
    row = vllm_serving._row(found["stock"], *found["half"], LOAD)
    assert row["requests_per_second"]["min"] < row["requests_per_second"]["max"] / 1.5
    ratios = row["against_stock"]
    for key in ("requests_per_second", "requests_per_processor_second"):
        assert ratios[key] == {"median": 2.0, "min": 2.0, "max": 2.0, "repeats": 3}
    assert ratios["room"] == 2.0
    lines = vllm_serving.summary({"rows": [row]}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        *("half", "3", "1.33", "2.00x (2.00 to 2.00)", "0.3", "1.00x (1.00 to 1.00)"),
        *("4", "2.00x (2.00 to 2.00)", "0.1", "1.00x (1.00 to 1.00)", "20.0", "2.00x"),
    ]
