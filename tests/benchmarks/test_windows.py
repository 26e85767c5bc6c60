"""What windows promise, counted pair by pair, and what the workload makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Window, Windows
from benchmarks import floors, models, windows

HEADS, GROUP, DIM = 2, 2, 16  # of the tiny model: hidden 64, 4 heads
SUBLAYERS = tuple(Sublayer(n, kind) for n in range(8) for kind in ("attention", "ffn"))


def seen(window: Window | None, head: int, t: int) -> int:
    """How many tokens the one at t sees."""
    if window is None or head in window.full_heads:
        return t + 1
    return sum(t - j < window.tokens or j < window.sinks for j in range(t + 1))


@given(
    st.integers(1, 12),
    st.integers(0, 5),
    st.sets(st.integers(0, HEADS - 1)),
    st.integers(1, 30),
    st.integers(0, 30),
)
def test_floors_count_what_is_seen(
    tokens: int, sinks: int, full: set[int], new: int, stored: int
) -> None:
    model, window = models.llama(), Window(tokens, sinks, tuple(full))
    empty = SkipPlan.empty(SUBLAYERS)
    plan = empty.with_windows(Windows.of(["2.attention"], window))  # type: ignore[list-item]
    less = sum(
        (seen(None, head, t) - seen(window, head, t))
        for head in range(HEADS)
        for t in [stored + new - 1]
    )
    total = stored + new
    saved = floors.decode_bytes(model, empty, total) - floors.decode_bytes(model, plan, total)
    assert saved == 4 * 2 * DIM * less
    pairs = sum(
        seen(None, head, t) - seen(window, head, t)
        for head in range(HEADS)
        for t in range(stored, total)
    )
    saved = floors.turn_flop(model, empty, new, stored) - floors.turn_flop(model, plan, new, stored)
    # floors take half of a square for a triangle: half a pair a token off, in each head
    assert abs(saved - 4 * pairs * GROUP * DIM) <= 4 * HEADS * GROUP * DIM * (new / 2 + tokens + 9)
    saved = floors.kv_bytes(model, empty, total) - floors.kv_bytes(model, plan, total)
    assert saved == 4 * 2 * DIM * less, "what is not seen is not stored"
    decode_only = empty.with_windows(Windows(decode=plan.windows.decode))
    assert floors.kv_bytes(model, decode_only, total) == floors.kv_bytes(model, empty, total)


def broken(result: dict[str, Any]) -> set[str]:
    found, full = set(), dict[int, dict[str, Any]]()
    for row in result["rows"]:
        first = full.setdefault(row["context"], row)
        for phase in ("prefill", "decode"):
            promised = first[f"{phase}_floor"] - row[f"{phase}_floor"]
            if row is first:
                continue
            if not promised > 0:
                found.add("promised")
            elif abs(row[f"{phase}_saved"] * promised - (first[phase] - row[phase])) > 1e-12:
                found.add("saved")
    if len(result["rows"]) != 4 * len(full) or len(result["new_windows_ms"]) != 6:
        found.add("rows")
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return windows.measure()


def test_the_workload(measured: dict[str, Any]) -> None:
    assert set(measured) == {"model", "dtype", "window", "rows", "new_windows_ms", "kv_bytes"}
    assert broken(measured) == set()
    lines = len(measured["rows"]) + len(measured["kv_bytes"]) + 2
    assert len(windows.summary(measured).splitlines()) == lines
    assert [row["plan"] for row in measured["kv_bytes"]] == [
        row["plan"] for row in measured["rows"][:4]
    ]
    assert all(row["held"] >= row["needed"] > 0 for row in measured["kv_bytes"])


def test_near_misses(measured: dict[str, Any]) -> None:
    wrong = copy.deepcopy(measured)
    wrong["rows"][1]["decode_saved"] += 0.001
    assert broken(wrong) == {"saved"}
    wrong = copy.deepcopy(measured)
    wrong["rows"][5]["prefill_floor"] = wrong["rows"][4]["prefill_floor"]
    assert "promised" in broken(wrong)
    wrong["rows"].pop()
    assert "rows" in broken(wrong)
