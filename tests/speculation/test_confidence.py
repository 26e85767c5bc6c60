"""An upper bound of a sum of which some terms are seen: that it holds as often as it says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from adaskip_fx.speculation.confidence import UpperBound

ERROR = 0.2
Radius = Callable[[UpperBound], float]


def radius(bound: UpperBound) -> float:
    return bound.radius


def of_a_normal_variable(bound: UpperBound) -> float:
    """Wrong: right for a known variance at one time, not for all times."""
    return bound.most * math.sqrt(bound.variance) * 0.8416


def without_the_coin(bound: UpperBound) -> float:
    """Wrong: as if every term were seen."""
    return bound.radius * SHARE


SHARE = 0.3


def chance_of_a_miss(terms: list[float], share: float, radius: Radius) -> float:
    """The exact probability that the sum is above its bound at some time: every way to see some."""
    missed = 0.0
    for seen in itertools.product((True, False), repeat=len(terms)):
        bound, total, chance, beyond = UpperBound(1 / share, ERROR), 0.0, 1.0, False
        for term, here in zip(terms, seen, strict=True):
            chance *= share if here else 1 - share
            bound.add(term / share if here else 0.0)
            total += term
            beyond |= total > bound.estimate + radius(bound)
        missed += chance * beyond
    return missed


@pytest.mark.parametrize("terms", [[1.0] * 12, [0.0] * 6 + [1.0] * 6, [0.5, 1.0] * 6, [0.01] * 12])
def test_it_is_exceeded_no_more_often_than_it_says(terms: list[float]) -> None:
    assert chance_of_a_miss(terms, SHARE, radius) <= ERROR


@pytest.mark.parametrize("wrong", [of_a_normal_variable, lambda bound: 0.0])
def test_a_wrong_radius_is_exceeded_more_often(wrong: Radius) -> None:
    """The companion."""
    assert chance_of_a_miss([1.0] * 12, SHARE, wrong) > ERROR


def shares_missed(terms: np.ndarray, share: float, radius: Radius, runs: int) -> float:
    """How many of some runs are above the bound at some time."""
    generator, missed = np.random.default_rng(0), 0
    for _ in range(runs):
        bound = UpperBound(1 / share, ERROR)
        seen = generator.random(len(terms)) < share
        beyond = False
        for total, value in zip(terms.cumsum(), np.where(seen, terms / share, 0.0), strict=True):
            bound.add(float(value))
            beyond = beyond or total > bound.estimate + radius(bound)
        missed += beyond
    return missed / runs


def test_long_sequences() -> None:
    """With both wrong radii: the one that forgets the coin shows where there are many terms."""
    terms = np.resize([1.0, 1.0, 0.2], 600)
    assert shares_missed(terms, SHARE, radius, 100) <= ERROR
    assert shares_missed(terms, SHARE, without_the_coin, 100) > ERROR
    assert shares_missed(terms, SHARE, of_a_normal_variable, 100) > ERROR


@given(st.floats(1e-3, 1e4), st.integers(1, 1000))
def test_it_is_close_to_the_best_bound_of_its_kind_and_never_below(v: float, n: int) -> None:
    """The oracle: the equation of the paper, minimized over all slopes at once."""
    bound = UpperBound(2.0, ERROR, terms=n, estimate=1.0, variance=v)

    def at(slope: float) -> float:
        return float((np.log(1 / ERROR) + (-np.log(1 - slope) - slope) * v) / slope)

    best = 2.0 * minimize_scalar(at, bounds=(1e-4, 1 - 1e-6), method="bounded").fun
    assert best <= bound.radius <= 3 * best
    assert bound.upper == 1.0 + bound.radius


@given(st.floats(0.01, 0.99), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_each_term_keeps_the_supermartingale(
    a: float, x: float, guess: float, share: float
) -> None:
    """E exp(a (x - Y) / B - psi(a) ((Y - G) / B)^2) <= 1, of both outcomes of the coin."""
    psi, mean = -math.log(1 - a) - a, 0.0
    for value, chance in ((x / share, share), (0.0, 1 - share)):
        scaled = (x - value) * share, ((value - guess / share) * share) ** 2
        mean += chance * math.exp(a * scaled[0] - psi * scaled[1])
    assert mean <= 1 + 1e-12


def test_terms_that_cannot_be() -> None:
    bound = UpperBound(2.0, ERROR)
    assert bound.upper == 0.0
    for value in (-0.1, 2.1, float("nan")):
        with pytest.raises(ValueError, match="within 0 and 2"):
            bound.add(value)
