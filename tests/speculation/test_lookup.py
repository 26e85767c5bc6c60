"""What is looked up is what followed the longest earlier copy of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.speculation.lookup import Lookup


def context(*rows: Sequence[int]) -> Any:
    return SimpleNamespace(rows=rows, input_ids=torch.zeros(1, 1, dtype=torch.int64))


def searched(text: Sequence[int], most: int, least: int) -> list[int]:
    """The oracle: every earlier place is compared."""
    best, length = None, least - 1
    for place in range(least, len(text)):
        common = 0
        while common < place and text[place - 1 - common] == text[len(text) - 1 - common]:
            common += 1
        if common >= length and common >= least:
            best, length = place, common
    if best is None:
        return []
    copied = list(text)
    for _ in range(most):
        copied.append(copied[best + len(copied) - len(text)])
    return copied[len(text) :]


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_every_text_as_it_grows(text: list[int], known: int, most: int, least: int) -> None:
    drafter = Lookup(least, places=100, compared=100).begin()
    for length in range(min(known, len(text)), len(text) + 1):
        drafts = drafter.propose(context(text[:length]), most)
        found = [] if drafts is None else drafts.tokens[0].tolist()
        assert found == searched(text[:length], most, least)


@pytest.mark.breaks
def test_an_index_that_forgets_the_prompt_shows() -> None:
    """The companion: the text is read once, as it grows."""
    drafter = Lookup().begin()
    text = [1, 2, 3, 9, 9, 1, 2]
    assert drafter.propose(context(text[:4]), 1) is None
    drafter._indices[0]._ends.clear()
    drafts = drafter.propose(context(text), 1)
    assert drafts is None or drafts.tokens.tolist() != [searched(text, 1, 2)]


def test_the_longest_copy_is_preferred_and_then_the_last() -> None:
    text = [7, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2, 4, 7, 1, 2]
    drafts = Lookup().begin().propose(context(text), 2)
    assert drafts is not None
    assert drafts.tokens.tolist() == [[5, 8]], "after 7, 1, 2"
    drafts = Lookup().begin().propose(context(text[1:]), 2)
    assert drafts is not None
    assert drafts.tokens.tolist() == [[4, 7]], "after 1, 2"
    assert drafts.probabilities is None


def test_a_copy_that_reaches_the_end_goes_on_as_it_began() -> None:
    drafts = Lookup().begin().propose(context([5, 6, 5, 6]), 5)
    assert drafts is not None
    assert drafts.tokens.tolist() == [[5, 6, 5, 6, 5]]


def test_rows_are_looked_up_apart() -> None:
    drafter = Lookup().begin()
    drafts = drafter.propose(context([1, 2, 3, 1, 2], [4, 5, 6, 7, 8]), 2)
    assert drafts is not None
    assert drafts.tokens.tolist() == [[3, 1], [8, 8]]
    assert Lookup().begin().propose(context([1, 2, 3], [4, 5, 6]), 2) is None


@pytest.mark.parametrize("options", [{"least": 0}, {"places": 1.5}, {"compared": -1}])
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        Lookup(**options)
