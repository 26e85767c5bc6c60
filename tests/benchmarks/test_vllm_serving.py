"""The plans and the table of `benchmarks run vllm`; the engines themselves want vLLM."""

from __future__ import annotations

from typing import Any

from adaskip_fx.plans.skip_plan import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.serving.static_plan import static_plan
from benchmarks import vllm_serving
from benchmarks.vllm_serving.contender import PLANS, Load, plan

LOAD = Load(2, 64, 4, 16, 12, 1, "float32")


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


def _row(name: str, rate: float, first: float, room: float) -> dict[str, Any]:
    return {
        **{"plan": name, "skipped": 3, "room": room},
        **{"requests_per_second": {"median": rate}, "first_token_seconds": {"median": first}},
    }


def test_rows_are_compared_with_the_mean_of_both_stock_runs() -> None:
    rows = [_row("stock", 2, 1, 10), _row("half", 6, 0.5, 20), _row("stock", 4, 1, 10)]
    lines = vllm_serving.summary({"rows": rows}).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["half", "3", "6.00", "2.00x", "0.500", "0.50x", "20.0", "2.00x"]
