"""A choice among groups of experts is one operator, against float64 and as it is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaskip_passes.decode.router_ops import choose_in_groups
from tests.passes.decode.test_experts import fused
from tests.support.eager_reference import relative_error
from tests.support.router_reference import chosen_in_groups

CHOOSE = torch.ops.adaskip.choose_in_groups.default
#: experts, chosen, groups, kept
CASES = ((256, 8, 8, 4), (160, 8, 1, 1), (24, 5, 3, 2), (10, 6, 5, 3))


def inputs(rows: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, experts, generator=source), torch.randn(experts, generator=source)


# The operator -----------------------------------------------------------------------------------


@given(st.sampled_from(CASES), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_the_operator(case: tuple[int, ...], rows: int, share: bool, seed: int) -> None:
    experts, *sizes = case
    how = (*sizes, share, 2.5)
    logits, bias = inputs(rows, experts, seed)
    values, places = choose_in_groups(logits, bias, *how)
    expected, ordered = chosen_in_groups(logits, bias, *how)
    assert torch.equal(places, ordered)
    assert relative_error(values.double(), expected) < 1e-6


@pytest.mark.breaks
@pytest.mark.parametrize("change", [(5, 3, 1), (5, 1, 1), (4, 3, 2)])
def test_how_it_is_made_matters(change: tuple[int, ...]) -> None:
    """The companion."""
    logits, bias = inputs(8, 24)
    _, ordered = chosen_in_groups(logits, bias, 5, 3, 2, True, 1.0)
    _, places = choose_in_groups(logits, bias, *change, True, 1.0)
    assert not torch.equal(places, ordered)
    _, places = choose_in_groups(logits, 0 * bias, 5, 3, 2, True, 1.0)
    assert not torch.equal(places, ordered)


def test_it_is_a_proper_operator() -> None:
    torch.library.opcheck(CHOOSE, (*inputs(3, 24), 5, 3, 2, True, 2.5))


# The pass ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Router:
    """DeepSeek-V3's, as transformers writes it, of 24 experts, and what may be otherwise."""

    groups: int = 3
    kept: int = 2
    share: bool = True
    factor: float | None = 2.5
    activate: Callable[[Tensor], Tensor] = torch.sigmoid
    best: int = 2
    least: float = 1e-20
    fill: float = -math.inf
    of_scores: bool = True
    mask_read: bool = False
    sums: Callable[[Tensor], Tensor] = lambda best: best.sum(dim=-1)

    def __call__(self, logits: Tensor, bias: Tensor) -> Any:
        scores = self.activate(logits)
        values, places, *mask = self.chosen(scores, scores + bias)
        return (by_expert(values, places), places.sort(-1)[0], *mask)

    def chosen(self, scores: Tensor, compared: Tensor) -> Any:
        best = compared.view(-1, self.groups, 24 // self.groups).topk(self.best, dim=-1)[0]
        totals = self.sums(best)
        chosen = torch.topk(totals, k=self.kept, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(totals)
        mask.scatter_(1, chosen, 1)
        spread = mask.unsqueeze(-1).expand(-1, self.groups, 24 // self.groups)
        masked = compared.masked_fill(~spread.reshape(-1, 24).bool(), self.fill)
        places = torch.topk(masked, k=5, dim=-1, sorted=False)[1]
        values = (scores if self.of_scores else compared).gather(1, places)
        if self.share:
            values = values / (values.sum(dim=-1, keepdim=True) + self.least)
        if self.factor is not None:
            values = values * self.factor
        return (values, places, mask) if self.mask_read else (values, places)


def by_expert(values: Tensor, places: Tensor) -> Tensor:
    """What each expert counts, whichever order they were chosen in."""
    return values.new_zeros(3, 24).scatter(1, places, values)


def calls(router: Router, in_place: bool = False) -> tuple[int, int]:
    """How often the operator is called after the pass, and topk; results are compared."""
    module = fused(lambda x, bias: router(x, bias), *inputs(3, 24), in_place=in_place)
    targets = [node.target for node in module.graph.nodes]
    topks = sum(target in (torch.topk, "topk") for target in targets)
    others = sum("choose_experts" in str(target) for target in targets)
    return targets.count(CHOOSE), topks + others


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("factor", [None, 1.0, 2.5])
@pytest.mark.parametrize(("groups", "kept"), [(3, 2), (1, 1), (12, 3)])
def test_a_choice_is_one_call(
    groups: int, kept: int, factor: float | None, share: bool, in_place: bool
) -> None:
    assert calls(Router(groups, kept, share, factor), in_place) == (1, 0)


OTHERS = {
    "softmax": Router(activate=lambda x: torch.softmax(x, -1)),
    "three of a group": Router(best=3),
    "another least sum": Router(least=1e-9),
    "another fill": Router(fill=0.0),
    "biased values": Router(of_scores=False),
    "the mask is read": Router(mask_read=True),
    "a mean": Router(sums=lambda best: best.mean(dim=-1)),
    "chosen of one group": Router(groups=6, kept=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_choice_is_not_it(name: str) -> None:
    assert calls(OTHERS[name])[0] == 0


def test_logits_in_half_precision_stay() -> None:
    """Their affinities are rounded before they are compared."""
    logits, bias = (t.to(torch.bfloat16) for t in inputs(3, 24))
    router = replace(Router(), factor=1.0)
    module = fused(lambda x, b: router(x, b)[1], logits, bias)
    assert CHOOSE not in [node.target for node in module.graph.nodes]


def test_values_that_are_written_later_stay() -> None:
    def written(logits: Tensor, bias: Tensor) -> Any:
        scores = torch.sigmoid(logits)
        values, places = Router(share=False, factor=None).chosen(scores, scores + bias)
        values.mul_(2)
        return by_expert(values, places)

    module = fused(written, *inputs(3, 24))
    assert CHOOSE not in [node.target for node in module.graph.nodes]
