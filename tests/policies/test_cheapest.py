"""The item that costs the least now, by what each cost before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.policies.candidates import cheapest

COSTS = st.dictionaries(st.integers(0, 9), st.floats(-9, 9), min_size=1)


@given(COSTS, st.integers(1, 9))
def test_costs_that_have_not_changed_are_judged_once(costs: dict[int, float], most: int) -> None:
    asked = list[int]()

    def judge(item: int) -> float:
        asked.append(item)
        return costs[item]

    best = min(costs, key=lambda item: (costs[item], item))
    assert cheapest(dict(costs), judge, most) == best
    assert asked == [best]


@given(COSTS, st.data())
def test_costs_that_have_grown(known: dict[int, float], data: st.DataObject) -> None:
    """Then the best one is found without judging all, if the list is as long as it takes."""
    now = {item: cost + data.draw(st.floats(0, 9)) for item, cost in known.items()}
    noted = dict(known)
    found = cheapest(noted, now.__getitem__, len(known))
    assert now[found] == min(now.values())
    assert all(noted[item] in (known[item], now[item]) for item in known)


def test_a_short_list_misses_it() -> None:
    """The near miss: the first two have become dear, and the third is not looked at."""
    now = {"a": 7.0, "b": 8.0, "c": 3.0}
    for most, best in ((1, "a"), (2, "a"), (3, "c")):
        known = {"a": 1.0, "b": 2.0, "c": 3.0}
        assert cheapest(known, now.__getitem__, most) == best
        assert [known[item] == now[item] for item in "ab"] == [True, most > 1]
