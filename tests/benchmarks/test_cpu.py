"""What the comparison on a CPU makes of the times of its contenders."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import cpu


def test_ours_is_compared_with_the_better_of_the_others() -> None:
    found = cpu._compared({"ours": lambda: 2.0, "eager": lambda: 4.0, "compiled": lambda: 1.0})
    assert (found["ratio"], found["beside"]) == (2.0, "compiled")
    assert found["ms"] == {"ours": 2000.0, "eager": 4000.0, "compiled": 1000.0}


def test_a_ratio_is_of_turns_side_by_side() -> None:
    """A machine that becomes slower meanwhile does not count."""
    clock = itertools.count(1)
    slower = {"ours": lambda: 1.1 * next(clock), "eager": lambda: float(next(clock))}
    assert cpu._compared(slower)["ratio"] == pytest.approx(1.1, rel=0.1)


@pytest.mark.parametrize(("ratio", "met"), [(1.0, "yes"), (1.05, "yes"), (1.06, "NO")])
def test_a_line_says_whether_the_aim_is_met(ratio: float, met: str) -> None:
    row = {"family": "llama", "what": "a step", "ratio": ratio, "ms": {"ours": 1.0, "eager": 1.0}}
    assert f"{ratio:.2f} (aim 1.05) {met} " in cpu.line(row)
    assert cpu.summary({"rows": [row, row]}).count("\n") == 1
