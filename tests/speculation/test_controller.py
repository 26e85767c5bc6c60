"""What is worth drafting: by a clock that the test moves, nothing is left to chance."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from adaskip_fx.speculation import controller, times
from adaskip_fx.speculation.controller import Controller, Source
from adaskip_fx.speculation.times import PLAIN, Times

ROWS, LENGTH = 1, 1000
NAME = "drafts"


@dataclass
class Device:
    """A device on which a plain step takes 1 and a block 1 + fixed + slope * k.

    Attributes:
        chance: how likely a draft is to stand.
        wake: what the plain step after a block takes besides.
    """

    fixed: float
    slope: float
    chance: float
    seed: int = 0
    wake: float = 0.0
    controller: Controller = field(init=False)
    spent: float = 0.0
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.controller = Controller(lambda: self.spent)
        self._random = random.Random(self.seed)

    def run(self, tokens: int, begin: float = 0.9, most: int = 15, supposed: float = 0.1) -> float:
        """Generate so many tokens; returns the plain steps that they took."""
        source, total = self.controller.source(NAME, "", begin), 0
        started, self.blocks = self.spent, []
        while total < tokens:
            _, count = self.controller.worth(NAME, source, most, ROWS, LENGTH, supposed)
            before, accepted = self.spent, 0
            if count:
                stand = (self._random.random() < self.chance for _ in range(count))
                accepted = sum(itertools.takewhile(bool, stand))
                self.spent += 1 + self.fixed + self.slope * count
                source.verified(count, accepted)
            else:
                self.spent += 1 + (self.wake if self.blocks and self.blocks[-1] else 0.0)
            self.blocks.append(count)
            kind = (NAME, count) if count else PLAIN
            took = self.spent - before
            self.controller.took(ROWS, LENGTH, kind, accepted + 1, took)
            total += accepted + 1
        return (self.spent - started) * tokens / total


def test_plain_steps_that_are_slower_now_and_then_are_no_debt() -> None:
    """As on a GPU: drafts that pay are drafted after many tokens for which there were none."""
    device = Device(1.0, 0.05, 0.85)
    for step in range(400):
        device.controller.took(ROWS, LENGTH, PLAIN, 1, 1.0 if step % 4 else 1.8)
    assert device.run(200) < 0.6 * 200


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("fixed", "slope", "chance"),
    [(0.05, 0.0, 0.0), (0.5, 0.3, 0.05), (0.1, 0.9, 0.3), (2.0, 1.0, 0.0), (0.0, 0.0, 0.0)],
)
def test_what_does_not_pay_costs_a_fiftieth(
    fixed: float, slope: float, chance: float, seed: int
) -> None:
    device = Device(fixed, slope, chance, seed)
    device.run(200)  # what was supposed is unlearned
    assert device.run(2000) <= 2000 / 0.97
    assert device.blocks.count(0) > len(device.blocks) * 0.5 or slope == 0


LATE = [(0.1, 0.9, 0.3), (0.05, 0.0, 0.0), (0.5, 0.3, 0.05)]


@pytest.mark.parametrize("kind", LATE)
def test_what_follows_a_block_is_what_it_costs(kind: tuple[float, float, float]) -> None:
    """Where plain steps run ahead of the host, the one after a block waits for it."""
    device = Device(*kind, wake=3.0)
    device.run(500)
    assert device.run(2000) <= 2000 / 0.97


@pytest.mark.breaks
@pytest.mark.parametrize("kind", LATE)
def test_it_could_cost_more(
    kind: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The companion."""
    monkeypatch.setattr(controller, "_WAKE", 0)
    device = Device(*kind, wake=3.0)
    device.run(500)
    assert device.run(2000) > 2000 / 0.95


@pytest.mark.parametrize(
    ("fixed", "slope", "chance", "least"),
    [(0.05, 0.0, 0.9, 4.0), (0.1, 0.05, 0.8, 2.2), (0.05, 0.5, 0.95, 1.3), (0.05, 0.0, 0.5, 1.6)],
)
def test_what_pays_is_drafted(fixed: float, slope: float, chance: float, least: float) -> None:
    device = Device(fixed, slope, chance)
    device.run(200)
    assert device.run(2000) < 2000 / least


@pytest.mark.breaks
def test_without_measuring_it_would_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: a controller that believes what was supposed of the times, and no account."""
    monkeypatch.setattr(Times, "ratio", lambda *args: 1.05)
    monkeypatch.setattr(controller, "_CAUTION", 0.0)
    device = Device(0.1, 0.9, 0.3)
    device.run(200)
    assert device.run(2000) > 2000 / 0.97


@pytest.mark.parametrize("busy", [1, 2])
def test_a_host_that_was_busy_for_a_moment_is_forgotten(busy: int) -> None:
    """Drafts that pay are drafted although their first blocks took as long as many steps."""
    assert _after_being_busy(busy) < 0.6 * 400


@pytest.mark.breaks
def test_a_host_that_was_busy_could_be_believed_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: whatever was measured once is believed, and is a debt."""
    monkeypatch.setattr(times, "_ODD", 1e9)
    monkeypatch.setattr(controller, "_MOST_LOST", 1e9)
    assert _after_being_busy(1) > 0.95 * 400


def _after_being_busy(blocks: int) -> float:
    device = Device(0.05, 0.0, 0.9)
    device.controller.took(ROWS, LENGTH, PLAIN, 1, 1.0)
    for _ in range(blocks):
        device.controller.took(ROWS, LENGTH, (NAME, 15), 4, 40.0)
    return device.run(400)


def test_a_text_that_begins_to_copy_is_noticed() -> None:
    device = Device(0.1, 0.05, 0.0)
    device.run(1000)
    device.chance = 0.95
    device.run(300)
    assert device.run(1000) < 1000 / 2
    device.chance = 0.0
    device.run(100)
    assert device.run(1000) <= 1000 / 0.97


def test_a_block_that_is_dear_for_being_one_is_tried_at_length() -> None:
    """As on a GPU with a small model: the host waits once a block, however long it is."""
    device = Device(0.9, 0.01, 0.95)
    assert device.run(400, begin=0.4) < 0.5 * 400


def test_a_text_that_no_longer_copies_costs_a_few_steps() -> None:
    device = Device(0.3, 0.1, 0.9)
    device.run(1000)
    device.chance = 0.0
    assert device.run(100) < 100 + 10


def test_longer_blocks_where_more_stands() -> None:
    lengths = []
    for chance in (0.3, 0.7, 0.95):
        device = Device(0.05, 0.08, chance)
        device.run(500)
        device.run(500)
        used = [count for count in device.blocks if count]
        lengths.append(sum(used) / len(used))
    assert lengths == sorted(lengths)
    assert lengths[2] > 2 * lengths[0]


def test_the_tokens_to_expect() -> None:
    source = Source(0.5)
    assert source.tokens(2) == [1, 1 + 0.5, 1 + 0.5 + 0.25]
    source.verified(3, 3)
    source.verified(3, 3)
    assert source.tokens(3)[-1] > 2.5
    for _ in range(50):
        source.verified(3, 1)
    assert source.acceptance(2)[0] > 0.9
    assert source.acceptance(2)[1] < 0.1
    assert source.tokens(3)[-1] == pytest.approx(2, abs=0.2)


def test_what_was_seen_long_ago_is_forgotten() -> None:
    source = Source(0.5)
    for _ in range(30):
        source.verified(3, 3)
    for _ in range(200):
        source.verified(3, 0)
    assert source.tokens(15)[-1] < 1.01


def test_times_of_what_was_not_measured() -> None:
    times = Times()
    assert times.plain(1, 100) is None
    assert times.ratio(1, 100, ("a", 4), 0.1) == pytest.approx(1.4)
    for kind, seconds in ((PLAIN, 2.0), (("a", 2), 3.0)):
        times.add(1, 100, kind, seconds)
    assert times.plain(1, 100) == 2.0
    assert times.plain(1, 1000) is None
    assert times.ratio(1, 100, ("a", 2), 0.1) == 1.5
    assert times.ratio(1, 100, ("a", 4), 0.9) == 2.0, "as much more for each token"
    assert times.ratio(1, 100, ("a", 4), 0.1) == pytest.approx(1.7), "but not more than supposed"
    assert times.ratio(1, 100, ("a", 1), 0.1) == pytest.approx(1.4), "and as much less for one"
    assert times.ratio(1, 1000, ("a", 2), 0.1) == 1.5, "as at another length"
    assert times.ratio(2, 100, ("a", 2), 0.1) == pytest.approx(1.2), "other rows are another thing"
    for _ in range(5):
        times.add(1, 100, PLAIN, 3.0)
    assert times.ratio(1, 100, ("a", 2), 0.1) == 1.0, "the last five count"


def test_what_is_not_worth_it_is_not_looked_at_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two steps there is little time; a longer block, more rows or new facts are news."""
    own, looked = Controller(lambda: 0.0), list[int]()
    ratio = own.times.ratio

    def seen(*args: Any) -> float:
        looked.append(1)
        return ratio(*args)

    monkeypatch.setattr(own.times, "ratio", seen)
    source = own.source(NAME, "", 0.3)

    def is_looked_at(most: int = 3, rows: int = ROWS) -> bool:
        own.took(rows, LENGTH, PLAIN, 1, 1.0)
        looked.clear()
        assert own.worth(NAME, source, most, rows, LENGTH, 0.9)[1] == 0
        return bool(looked)

    own.took(ROWS, LENGTH, PLAIN, 1, 1.0)
    assert [is_looked_at() for _ in range(17)] == [i % 8 == 0 for i in range(17)]
    assert not is_looked_at(most=2)
    assert is_looked_at(most=4)
    assert is_looked_at(rows=2)
    assert not is_looked_at(rows=2)
    source.verified(1, 0)
    assert is_looked_at(rows=2)
