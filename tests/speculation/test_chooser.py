"""Whose drafts are asked for: of several plans the one that gives most tokens for its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.speculation.chooser import Chooser
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.proposals import Drafts
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation

SUBLAYERS = tuple(map(Sublayer.parse, ("0.attention", "0.ffn", "1.attention", "1.ffn")))
LIGHT, HEAVY = (SkipPlan.of(SUBLAYERS, names) for names in (["0.ffn"], ["0.ffn", "1.ffn"]))


@dataclass
class Request:
    """A text of which the drafts of each plan stand as often as is said, and take so long.

    Attributes:
        stands: how many drafts of a block stand at most, by plan.
        takes: steps that each draft takes, by plan.
        now: steps so far.
    """

    stands: dict[SkipPlan, int]
    takes: dict[SkipPlan, float]
    now: float = 0.0
    used: list[SkipPlan | None] = field(default_factory=list)
    samples: bool = False
    plan: SkipPlan = LIGHT
    rows: Any = ((1, 2, 3),)
    input_ids: Any = None

    def due(self, plan: SkipPlan, weaker: Any) -> SkipPlan:
        return plan

    def draft(self, plan: SkipPlan, most: int) -> Drafts:
        self.now += most * self.takes[plan]
        tokens = torch.zeros(1, most, dtype=torch.int64)
        return Drafts(tokens, kind=plan.digest[:8], plan=plan)

    def run(self, chooser: Chooser, tokens: int) -> None:
        while tokens > 0:
            chooser.took(100, undisturbed=True)
            chooser.settle()
            context: Any = self
            offer = chooser.offer(context, 7, 100)
            drafts = chooser.drafts(context, offer) if offer is not None else None
            self.now += 1.0
            self.used.append(None if drafts is None else drafts.plan)
            accepted = 0
            if offer is not None and drafts is not None:
                assert drafts.plan is not None
                accepted = min(drafts.count, self.stands[drafts.plan])
                chooser.verified(offer, drafts, accepted, drafts.kind)
            tokens -= accepted + 1


def most_used(stands: tuple[int, int], takes: tuple[float, float]) -> SkipPlan | None:
    request = Request(*(dict(zip((LIGHT, HEAVY), of, strict=True)) for of in (stands, takes)))
    decoding = Lossless((Skipped(LIGHT), Skipped(HEAVY)))
    speculation = Speculation(decoding, LIGHT, clock=lambda: request.now)
    request.run(Chooser(speculation, 1), 600)
    request.used.clear()
    request.run(Chooser(speculation, 1), 600)
    others = Counter(request.used)
    (plan, often), *_ = others.most_common(1)
    assert often > 0.6 * others.total()
    return plan


@pytest.mark.parametrize(
    ("stands", "takes", "plan"),
    [
        ((7, 1), (0.6, 0.5), LIGHT),  # 8 tokens in 5.2 steps, 2 in 4.5
        ((7, 7), (0.6, 0.3), HEAVY),
        ((1, 7), (0.3, 0.4), HEAVY),  # 2 in 1.3, 8 in 3.8
        ((7, 3), (0.9, 0.1), HEAVY),  # 8 tokens in 7.3 steps, 4 in 1.3
        ((0, 0), (0.5, 0.5), None),
    ],
)
def test_of_several_plans_the_one_that_pays_most_is_drafted_with(
    stands: tuple[int, int], takes: tuple[float, float], plan: SkipPlan | None
) -> None:
    assert most_used(stands, takes) is plan


def test_proposers_that_are_alike_are_told_apart_by_their_plans() -> None:
    decoding = Lossless((Lookup(), Skipped(LIGHT), Skipped(HEAVY), Skipped()))
    chooser = Chooser(Speculation(decoding, LIGHT), 1)
    skipped = [f"skipped {plan.digest[:8]}" for plan in (LIGHT, HEAVY)]
    assert [name for name, *_ in chooser._drafters] == ["lookup", *skipped, "skipped"]
    alone = Chooser(Speculation(Lossless((Skipped(LIGHT),)), LIGHT), 1)
    assert [name for name, *_ in alone._drafters] == ["skipped"]


class Silent:
    """Costs something to ask, and has drafts from a round on; knows in which it was asked."""

    name, free = "silent", False

    def __init__(self, begins: int) -> None:
        self.begins, self.round, self.asked = begins, 0, list[int]()

    def begin(self) -> Silent:
        return self

    def propose(self, context: Any, most: int) -> Drafts | None:
        self.asked.append(self.round)
        has = self.round >= self.begins
        return Drafts(torch.zeros(1, most, dtype=torch.int64)) if has else None


def asked(begins: int, rounds: int) -> list[int]:
    """In which rounds somebody is asked who has nothing before one of them."""
    silent, request = Silent(begins), Request({}, {})
    chooser = Chooser(Speculation(Lossless((silent,), adaptive=False), LIGHT), 1)
    context: Any = request
    for silent.round in range(rounds):
        offer = chooser.offer(context, 3, 100)
        if offer is not None and (drafts := chooser.drafts(context, offer)) is not None:
            chooser.verified(offer, drafts, 1)
        chooser.took(100, undisturbed=True)
    return silent.asked


def test_who_has_nothing_to_propose_is_asked_again_less_and_less_often() -> None:
    assert asked(begins=9, rounds=20)[:4] == [0, 2, 5, 10], "after rests of 1, 2 and 4 rounds"
    assert asked(begins=9, rounds=20)[4:] == list(range(11, 20)), "there is something now"
    never = asked(begins=1000, rounds=1000)
    assert never[-1] - never[-2] == 65, "a request asks so often at least"
