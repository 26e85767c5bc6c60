"""What many requests are measured against: their lengths, and times between those measured."""

from __future__ import annotations

import pytest

from benchmarks.situations.many_requests import Request, between, drawn


def test_requests_are_the_same_in_every_run() -> None:
    requests = drawn(1000, 8192)
    assert requests == drawn(1000, 8192)
    assert len(set(requests)) == 32
    assert all(1000 <= r.prompt <= 8192 and 16 <= r.new <= 256 for r in requests)
    assert drawn(1000, 8192, 2) == requests[:2]
    assert drawn(40, 128, 1)[0] == Request(89, 4), "tiny ones have new tokens too"


@pytest.mark.parametrize(
    ("point", "value"), [(10, 1.0), (15, 2.0), (20, 3.0), (30, 5.0), (50, 13.0), (0, -1.0)]
)
def test_between_what_was_measured(point: float, value: float) -> None:
    """Lines through (10, 1), (20, 3) and (40, 7) up to there; of (40, 7) and (45, 10) beyond."""
    assert between([10, 20, 40, 45], [1.0, 3.0, 7.0, 10.0], point) == pytest.approx(value)
