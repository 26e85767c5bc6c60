"""The table that a soak prints: what was run by structure, and what failed at the end."""

from __future__ import annotations

from tests.machine.soak import Count, table


def test_counts_of_a_structure_are_added_and_failures_are_named() -> None:
    counts = [
        Count("llama", 1200, 30, 4),
        Count("mamba", 7, 5, 1, [(41, "DifferenceError: another value")]),
        Count("llama", 34, 1, 2),
    ]
    rows, _, failures = table(counts).partition("\n\n")
    assert [line.split() for line in rows.splitlines()] == [
        ["structure", "sequences", "answered", "refused", "failed"],
        ["llama", "1,234", "31", "6", "0"],
        ["mamba", "7", "5", "1", "1"],
        ["all", "1,241", "36", "7", "1"],
    ]
    assert failures == "mamba, seed 41: DifferenceError: another value"
