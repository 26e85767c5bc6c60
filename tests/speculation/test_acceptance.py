"""Accepted and redrawn tokens have the full program's probabilities, whoever drafts.

Many rows stand for many requests: what a rule does with one row does not depend on the others.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.speculation.acceptance import (
    Column,
    Greedy,
    Sampling,
    best_of_rows,
    leading,
)
from adaskip_fx.speculation.proposals import Drafts
from tests.support.drafts import AlwaysAccepts, DrawsAnew

ROWS = 60_000
#: Of a chi-square variable with 4 degrees of freedom, exceeded once in 10 ** 6.
LIMIT = 33.4
TARGET = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
DRAFTS = {
    "of a draft model": torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1]),
    "of the full model": TARGET,
    "that are certain": None,
}


def tokens_of(rule: Sampling, proposed: torch.Tensor | None, seed: int = 0) -> torch.Tensor:
    """Return the token of each of many rows after one draft."""
    torch.manual_seed(seed)
    scores = TARGET.log().expand(ROWS, -1)
    if proposed is None:
        drafts, chances = torch.full((ROWS,), 2), None
    else:
        chances = proposed.expand(ROWS, -1)
        drafts = torch.multinomial(proposed, ROWS, replacement=True)
    columns = None if chances is None else chances.unsqueeze(1)
    proposals = Drafts(drafts.unsqueeze(1), columns)
    accepted = rule.accepts(scores.unsqueeze(1), proposals, scores.unsqueeze(1))[:, 0]
    column = Column(scores, drafts, accepted, chances, torch.tensor(True))
    tokens, invalid = rule.replace(column)
    assert invalid is None or not invalid
    return tokens


def distance(tokens: torch.Tensor) -> float:
    """Return the chi-square statistic of tokens against the target."""
    counts, expected = torch.bincount(tokens, minlength=5), TARGET * len(tokens)
    if counts[4]:
        return float("inf")
    return float(((counts - expected)[:4] ** 2 / expected[:4]).sum())


@pytest.mark.parametrize("kind", DRAFTS)
def test_tokens_have_the_targets_probabilities(kind: str) -> None:
    assert distance(tokens_of(Sampling(), DRAFTS[kind])) < LIMIT


@pytest.mark.breaks
@pytest.mark.parametrize("rule", [AlwaysAccepts(), DrawsAnew()])
@pytest.mark.parametrize("kind", ["of a draft model", "that are certain"])
def test_a_wrong_rule_shows(rule: Sampling, kind: str) -> None:
    """The companion."""
    assert distance(tokens_of(rule, DRAFTS[kind])) > 10 * LIMIT


def test_drafts_of_the_full_model_are_all_accepted() -> None:
    scores = TARGET.log().expand(500, 1, -1)
    drafts = torch.multinomial(TARGET, 500, replacement=True).unsqueeze(1)
    assert Sampling().accepts(scores, Drafts(drafts, TARGET.expand(500, 1, -1)), scores).all()


def test_what_differs_by_a_rounding_leaves_something_to_draw() -> None:
    scores = TARGET.log().unsqueeze(0)
    column = Column(
        scores,
        torch.tensor([1]),
        torch.tensor([False]),
        TARGET.unsqueeze(0) + 1e-3,
        torch.tensor(True),
    )
    token, invalid = Sampling().replace(column)
    assert not invalid
    assert token.item() < 4


@pytest.mark.parametrize("draft", [0, 3])
def test_scores_that_are_no_numbers_are_told(draft: int) -> None:
    scores = torch.full((1, 5), torch.nan)
    drafts = torch.tensor([draft])
    rule = Sampling()
    block = scores.unsqueeze(1)
    accepted = rule.accepts(block, Drafts(drafts.unsqueeze(1)), block)[:, 0]
    assert not accepted.any()
    assert rule.replace(Column(scores, drafts, accepted, None, torch.tensor(True)))[1]


def test_greedy() -> None:
    scores = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]], [[0.0, 2.0, 1.0], [0.0, 0.0, 9.0]]])
    drafts = torch.tensor([[1, 0], [1, 1]])
    accepted = Greedy().accepts(scores, Drafts(drafts), scores)
    assert accepted.tolist() == [[True, True], [True, False]]
    column = Column(scores[:, 1], drafts[:, 1], accepted[:, 1], None, torch.tensor(True))
    assert Greedy().replace(column)[0].tolist() == [0, 2]


def test_a_block_stands_as_far_as_all_rows_accept_it() -> None:
    accepted = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    assert leading(accepted) == 2
    assert leading(accepted[1:]) == 4
    assert leading(~accepted) == 0


TOKENS = st.lists(st.integers(0, 2), min_size=5, max_size=5)


@given(
    st.integers(1, 4),
    st.lists(st.tuples(TOKENS, TOKENS, st.booleans()), min_size=1, max_size=3),
    st.sets(st.integers(0, 2)),
    st.none() | st.integers(0, 2),
)
def test_a_block_by_its_best_tokens(
    count: int,
    rows: list[tuple[list[int], list[int], bool]],
    ends: set[int],
    padding: int | None,
) -> None:
    """The oracle: a loop that writes one column after the other, as plain decoding does."""
    drafts, best = [row[0][:count] for row in rows], [row[1][: count + 1] for row in rows]
    going = [row[2] for row in rows]
    stand, columns, after = best_of_rows(drafts, best, going, ends, padding)
    written, alive = list[list[int]](), list(going)
    for place in range(count + 1):
        column = list[int]()
        for row in range(len(rows)):
            padded = padding is not None and not going[row]
            column.append(padding if padded and padding is not None else best[row][place])
            alive[row] = alive[row] and column[row] not in ends
        written.append(column)
        stood = place < count and all(
            drafts[row][place] == best[row][place] or (padding is not None and not going[row])
            for row in range(len(rows))
        )
        if alive != going or not stood:
            break
    assert (columns, after) == (written, alive)
    assert 0 <= stand <= count
    assert len(columns) <= stand + 1
