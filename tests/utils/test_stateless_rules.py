"""Which rules of transformers' and users' may be asked about a whole block of tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
)

from adaskip_fx.utils.stateless_rules import ending_tokens, ends_by_token, remember_nothing


class Mine(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class EosTokens(EosTokenCriteria):
    """A user's own, although it is one of transformers'."""


@pytest.mark.parametrize(
    ("rules", "length", "expected"),
    [
        ([], 10, True),
        ([MaxLengthCriteria(20)], 10, True),
        ([MaxLengthCriteria(20)], 20, False),
        ([MaxLengthCriteria(20), EosTokenCriteria([1, 2])], 19, True),
        ([EosTokenCriteria(1), MaxTimeCriteria(1.0)], 10, False),
        ([EosTokenCriteria(1), Mine()], 10, False),
        ([EosTokens(1)], 10, False),
    ],
)
def test_whether_the_last_token_says_that_a_row_ends(
    rules: list[Any], length: int, expected: bool
) -> None:
    assert ends_by_token(rules, length) is expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], frozenset()),
        ([MaxLengthCriteria(20), EosTokenCriteria([1, 2])], frozenset({1, 2})),
        ([EosTokenCriteria(1), EosTokenCriteria(7)], frozenset({1, 7})),
        ([MaxLengthCriteria(20), MaxLengthCriteria(30)], None),
        ([EosTokenCriteria(1), Mine()], None),
    ],
)
def test_the_tokens_that_end_a_row(rules: list[Any], expected: frozenset[int] | None) -> None:
    assert ending_tokens(rules) == expected


def test_rules_that_remember_nothing() -> None:
    assert remember_nothing([MaxLengthCriteria(20), MaxTimeCriteria(1.0)])
    assert not remember_nothing([Mine()])
    assert not remember_nothing([EosTokens(1)])
