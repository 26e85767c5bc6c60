"""Options of items: compared with every choice that there is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.latency.multiple_choice import choose_options

#: For each item what its options lose, and save.
Items = list[list[tuple[float, tuple[float, ...]]]]


def sums(items: Items, chosen: tuple[int, ...]) -> tuple[float, tuple[float, ...]]:
    """What a choice loses and saves; by hand."""
    lost, saved = 0.0, [0.0] * len(items[0][0][1])
    for options, number in zip(items, chosen, strict=True):
        if number >= 0:
            lost += options[number][0]
            saved = [a + b for a, b in zip(saved, options[number][1], strict=True)]
    return lost, tuple(saved)


def every(items: Items) -> list[tuple[int, ...]]:
    return list(product(*(range(-1, len(options)) for options in items)))


def choose(items: Items, *needs: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
    losses = [[lost for lost, _ in options] for options in items]
    savings = [[saved for _, saved in options] for options in items]
    chosen, saved = choose_options(losses, savings, needs)
    assert tuple(saved) == pytest.approx(sums(items, tuple(chosen))[1])
    return tuple(chosen), tuple(saved)


def test_the_cheapest_savings_first_and_what_is_too_much_is_taken_back() -> None:
    """For what they save they lose 1 and 4; 2 and 3; then the second goes without its 3."""
    items: Items = [[(2, (2,)), (10, (4,))], [(6, (3,)), (12, (5,))]]
    assert choose(items, 2) == ((0, -1), (2,))
    assert choose(items, 5) == ((0, 0), (5,))
    assert choose(items, 6) == ((0, 1), (7,))
    assert choose(items, 9) == ((1, 1), (9,))
    assert choose(items, 3) == ((-1, 0), (3,)), "the first one is needed no more"
    assert choose(items, 0) == ((-1, -1), (0,))


def test_a_change_may_pass_over_an_option() -> None:
    """The first option alone would lose 3 for 1; with the second it is 2 for 1."""
    items: Items = [[(3, (1,)), (4, (2,))], [(5, (2,))]]
    assert choose(items, 1) == ((0, -1), (1,)), "at the end the cheapest that is enough"
    assert choose(items, 2) == ((1, -1), (2,))


def test_of_two_needs_only_what_is_missing_counts() -> None:
    """Once the first is met, what saves the most of both is no better than what saves the other."""
    items: Items = [[(1, (9, 1))], [(1, (5, 0))], [(2, (0, 4))]]
    assert choose(items, 1, 4) == ((0, -1, 0), (9, 5))


def test_what_cannot_be_reached_comes_as_near_as_it_can() -> None:
    items: Items = [[(1, (1.0,)), (2, (3.0,))], [(1, (0.0,))], [(1, (-1.0,))]]
    assert choose(items, 5) == ((1, -1, -1), (3,))
    chosen, saved = choose_options([], [], [1.0])
    assert (chosen, list(saved)) == ([], [0.0])


OPTION = st.tuples(st.integers(0, 12), st.tuples(st.integers(-2, 6)))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=4)


@given(ITEMS, st.integers(0, 16))
def test_beside_every_choice(items: Items, need: int) -> None:
    """It is enough where anything is, and at most the last change worse than the best."""
    enough = [c for c in every(items) if sums(items, c)[1][0] >= need]
    chosen, saved = choose(items, need)
    if not enough:
        assert saved[0] == max(sums(items, c)[1][0] for c in every(items))
        return
    lost = sums(items, chosen)[0]
    best = min(sums(items, c)[0] for c in enough)
    dearest = max(lost for options in items for lost, _ in options)
    assert saved[0] >= need
    assert best <= lost <= best + dearest
    for number, options in enumerate(items):
        for other in range(-1, len(options)):
            changed = (*chosen[:number], other, *chosen[number + 1 :])
            assert sums(items, changed)[0] >= lost or changed not in enough


ONE_EACH = st.lists(st.tuples(st.integers(0, 12), st.tuples(st.integers(0, 6), st.integers(0, 6))))


@given(ONE_EACH, st.integers(0, 20), st.integers(0, 20))
def test_two_needs_are_both_met_where_they_can_be(options: list[Any], one: int, other: int) -> None:
    """Where nothing saves less than nothing, everything together says what can be."""
    together = [sum(saved[n] for _, saved in options) for n in range(2)]
    met = (
        [choose([[o] for o in options], one, other)[1][n] for n in range(2)] if options else [0, 0]
    )
    reached = [min(have, need) for have, need in zip(met, (one, other), strict=True)]
    assert reached == [min(have, need) for have, need in zip(together, (one, other), strict=True)]


def test_what_saves_one_thing_and_takes_back_another() -> None:
    """Two options of one item, each for one need, do not take turns for ever."""
    apart = [(1, (5, 0)), (1, (0, 5))]
    assert choose([[*apart, (3, (5, 5))]], 4, 4) == ((2,), (5, 5))
    chosen, saved = choose([apart], 4, 4)
    assert sum(saved) == 5
    assert chosen != (-1,)
