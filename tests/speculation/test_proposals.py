"""Drafts: a part of them is a part of everything that is known of them."""

from __future__ import annotations

import pytest
import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.speculation.proposals import Drafts

ROWS = [[5, 3, 9, 2], [1, 8, 4, 7]]


def test_those_of_the_host_are_not_read_from_their_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = Drafts.on_host(ROWS, "of a kind", 0.4)
    assert torch.equal(drafts.tokens, torch.tensor(ROWS))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("it was read"))
    some = drafts.columns(1, 3)
    assert some.listed == [[3, 9], [8, 4]]
    assert (some.kind, some.chance, some.count) == ("of a kind", 0.4, 2)
    assert some.after([[0], [6]]).shape == (2, 3)


@pytest.mark.parametrize("listed", [False, True])
def test_a_part_keeps_all_that_is_known(listed: bool) -> None:
    plan = SkipPlan.empty([Sublayer.parse("0.attention"), Sublayer.parse("0.ffn")])
    chances, logits = torch.rand(2, 4, 11), torch.rand(2, 4, 11)
    drafts = Drafts(torch.tensor(ROWS), chances, "drawn", 0.6, logits, plan)
    if listed:
        assert drafts.listed == ROWS
    some = drafts.columns(1, 3)
    assert some.plan is plan
    assert some.probabilities is not None
    assert some.logits is not None
    assert torch.equal(some.probabilities, chances[:, 1:3])
    assert torch.equal(some.logits, logits[:, 1:3])
    assert some.listed == some.tokens.tolist() == [[3, 9], [8, 4]]
