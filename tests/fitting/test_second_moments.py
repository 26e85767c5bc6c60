"""A fit's moments: vectors that are zero or not finite decide nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.fitting import SecondMoments, SurrogateSpec
from adaskip_fx.fitting.least_squares import solve

HIDDEN, TOKENS = 3, 6


def moments_of(x: torch.Tensor, y: torch.Tensor, normalized: bool = False) -> SecondMoments:
    made = SecondMoments.zeros(HIDDEN, torch.device("cpu"), normalized)
    made.add(x, y)
    return made


def streams(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return x, x.flip(1) * 1.5


@given(st.data())
def test_what_cannot_be_measured_is_left_out(data: st.DataObject) -> None:
    """The same sums as of the other tokens alone, and their number."""
    x, y = streams(data.draw(st.integers(0, 9), "seed"))
    spoiled = data.draw(st.sets(st.integers(0, TOKENS - 1), max_size=3), "tokens")
    for token in spoiled:
        value = data.draw(st.sampled_from([0.0, math.nan, math.inf, -math.inf]), "value")
        where = x if value == 0 else data.draw(st.sampled_from([x, y]), "stream")
        where[token] = value
    rest = [i for i in range(TOKENS) if i not in spoiled]
    normalized = data.draw(st.booleans(), "normalized")
    found, expected = moments_of(x, y, normalized), moments_of(x[rest], y[rest], normalized)
    assert found.tokens == len(rest)
    for name in ("inputs", "products", "targets"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_one_vector_spoiled_all() -> None:
    """The smallest: a fit of the factor 2 from one token, beside one that is infinite."""
    x = torch.tensor([[1.0, 0.0, 0.0], [math.inf, 0.0, 0.0]])
    found = solve(moments_of(x, 2 * x), "scale")
    assert found.factor == pytest.approx(2)
    short = torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.0, 0.0]])  # the companion: this one counts
    other = solve(moments_of(short, torch.tensor([[2.0, 0.0, 0.0], [0.4, 0.0, 0.0]])), "scale")
    assert other.factor == pytest.approx(3)


def test_nothing_to_fit_on_is_said() -> None:
    x = torch.full((2, HIDDEN), math.nan)
    with pytest.raises(ValueError, match="nothing to fit on: the stream of every token is zero or"):
        SurrogateSpec("scale").fit([moments_of(x, x), moments_of(0 * x, x)])


def test_a_fold_in_which_nothing_counts_is_left_out() -> None:
    x, y = streams(1)
    nothing = moments_of(torch.zeros(2, HIDDEN), torch.ones(2, HIDDEN))
    assert nothing.tokens == 0
    alone = SurrogateSpec("scale").fit([moments_of(x, y)])
    assert SurrogateSpec("scale").fit([moments_of(x, y), nothing]) == alone
