"""What many requests are measured against: their lengths, and what these take by themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.situations import many_requests
from benchmarks.situations.many_requests import Request, drawn


def test_requests_are_the_same_in_every_run() -> None:
    requests = drawn(1000, 8192)
    assert requests == drawn(1000, 8192)
    assert len(set(requests)) == 32
    assert all(1000 <= r.prompt <= 8192 and 16 <= r.new <= 256 for r in requests)
    assert drawn(1000, 8192, 2) == requests[:2]
    assert drawn(40, 128, 1)[0] == Request(89, 4), "tiny ones have new tokens too"


class Card:
    """A card on which a token of a prompt takes 2 s, and a step as long as there are tokens."""

    def __init__(self, steps: float = 1.0) -> None:
        self.sizes = SimpleNamespace(first=40, short=130)
        self._steps, self._length = steps, 0

    def filled(self, ids: torch.Tensor) -> int:
        return ids.shape[1]

    def times(self, runs: dict[str, Callable[[], int]], settle: int) -> Any:
        return {name: 2.0 * run() for name, run in runs.items()}, None

    def step_seconds(self, length: int) -> float:
        return self._steps * length

    def begin(self) -> None:
        pass


def test_what_requests_take_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: prompts of 50 and 100 tokens, and steps at 52 and 101; between what was measured."""
    monkeypatch.setattr(models, "tokens", lambda batch, count: torch.zeros(batch, count))
    requests = [Request(50, 5), Request(100, 3)]
    by_hand = 2 * 50 + 2 * 100 + 4 * 52 + 2 * 101
    assert many_requests._promise(Card(), requests) == pytest.approx(by_hand)  # type: ignore[arg-type]
    slower = many_requests._promise(Card(1.1), requests)  # type: ignore[arg-type]
    assert slower == pytest.approx(by_hand + 0.1 * (4 * 52 + 2 * 101))
