"""Neighbouring surrogates as one, against the two applied one after the other in numpy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_fx.plans.compose_surrogates import (
    ComposedSurrogate,
    SurrogateTensors,
    compose_surrogates,
)
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import SHAPES, Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from tests.support.surrogates import surrogate

HIDDEN = 12
CPU = torch.device("cpu")
SUBLAYERS = tuple(Sublayer(i, kind) for i in range(4) for kind in ("attention", "ffn"))


def applied(x: np.ndarray[Any, Any], by: Surrogate) -> np.ndarray[Any, Any]:
    """The definition, row by row."""
    t = by.tensors
    rows = []
    for row in x:
        if by.kind in ("scale", "diagonal"):
            rows.append(row * t["factor"])
            continue
        if by.kind == "normalized":
            row_in = row / np.sqrt((row**2).mean() + 1e-6)
            rows.append(row + t["weight"] @ row_in + t["bias"])
            continue
        branch = t["weight"] @ row if by.kind == "linear" else t["up"] @ (t["down"] @ row)
        rows.append(row + branch + t["bias"])
    return np.stack(rows)


KINDS = st.sampled_from(list(SHAPES))
PARTS = st.lists(st.tuples(KINDS, st.integers(0, 99), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=150)
@given(PARTS)
def test_a_fold_is_its_parts_in_turn(drawn: list[tuple[Any, int, int]]) -> None:
    parts = [surrogate(kind, seed, HIDDEN, rank) for kind, seed, rank in drawn]
    composed = ComposedSurrogate.of(parts[0])
    used = parts[:1]
    for part in parts[1:]:
        more = composed.then(part)
        if more is None:
            break
        composed, used = more, [*used, part]
    x = np.random.default_rng(0).normal(size=(3, HIDDEN))
    tensors = {n: t.numpy() for n, t in composed.tensors(CPU).items()}
    assert {n: t.shape for n, t in tensors.items()} == {
        n: tuple({"H": HIDDEN, "r": composed.rank}[letter] for letter in letters)
        for n, letters in SHAPES[composed.kind].items()
    }
    expected = functools.reduce(applied, used, x)
    together = _applied_float64(x, composed, tensors)
    np.testing.assert_allclose(together, expected, rtol=1e-9, atol=1e-9)
    if len(used) > 1:  # companion: in another order it is another function, but for factors
        backwards = functools.reduce(applied, used[::-1], x)
        commute = {p.kind for p in used} <= {"scale", "diagonal"} or used == used[::-1]
        assert np.allclose(together, backwards, rtol=1e-9, atol=1e-9) == commute


def _applied_float64(
    x: np.ndarray[Any, Any], composed: ComposedSurrogate, t: dict[str, np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    if "factor" in t:
        return x * t["factor"]
    if composed.kind == "normalized":
        size = np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
        return x + (x / size) @ t["weight"].T + t["bias"]
    return x + x @ (t["weight"] if composed.kind == "linear" else t["up"] @ t["down"]).T + t["bias"]


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        ("scale", "scale", "scale"),
        ("scale", "diagonal", "diagonal"),
        ("diagonal", "linear", "linear"),
        ("linear", "low_rank", "linear"),
        ("low_rank", "low_rank", "low_rank"),
        ("scale", "low_rank", None),
        ("low_rank", "diagonal", None),
        ("linear", "normalized", None),
        ("normalized", "scale", None),
    ],
)
def test_what_two_become(first: Any, second: Any, result: str | None) -> None:
    composed = ComposedSurrogate.of(surrogate(first, 0, HIDDEN)).then(surrogate(second, 1, HIDDEN))
    assert (composed.kind if composed else None) == result


def test_ranks_add_up_while_that_is_cheaper() -> None:
    one = ComposedSurrogate.of(surrogate("low_rank", 0, HIDDEN, rank=6))
    assert one.then(surrogate("low_rank", 1, HIDDEN, rank=6)) is None
    smaller = one.then(surrogate("low_rank", 1, HIDDEN, rank=5))
    assert smaller is not None
    assert smaller.rank == 11


def plan(skip: dict[str, str], kinds: dict[str, Any]) -> SkipPlan:
    actions = {Sublayer.parse(n): Action(a) for n, a in skip.items()}
    surrogates = {Sublayer.parse(n): surrogate(k, 0, HIDDEN) for n, k in kinds.items()}
    return SkipPlan(SUBLAYERS, actions, actions, Surrogates(surrogates))


def names(found: dict[Sublayer, ComposedSurrogate]) -> dict[str, tuple[str, int]]:
    return {str(s): (f.kind, len(f.members)) for s, f in found.items()}


def test_only_what_nothing_runs_between_is_folded() -> None:
    skipped = dict.fromkeys(["0.ffn", "1.attention", "1.ffn", "2.ffn"], "skip")
    given = plan(skipped, dict.fromkeys(skipped, "linear"))
    assert names(compose_surrogates(given, "prefill")) == {
        "1.ffn": ("linear", 3),
        "2.ffn": ("linear", 1),
    }
    apart = compose_surrogates(given, "prefill", neighbours=False)
    assert names(apart) == dict.fromkeys(skipped, ("linear", 1))


def test_what_passes_through_does_not_part_neighbours() -> None:
    given = plan(
        dict.fromkeys(["0.ffn", "1.attention", "1.ffn"], "skip"),
        {"0.ffn": "scale", "1.ffn": "diagonal"},
    )
    assert names(compose_surrogates(given, "decode")) == {"1.ffn": ("diagonal", 2)}


def test_kv_is_written_from_the_stream_before_it() -> None:
    kinds = dict.fromkeys(["0.ffn", "1.attention", "1.ffn"], "linear")
    given = plan({"0.ffn": "skip", "1.attention": "kv_only", "1.ffn": "skip"}, kinds)
    assert names(compose_surrogates(given, "prefill")) == {
        "0.ffn": ("linear", 1),
        "1.ffn": ("linear", 2),
    }


def test_tensors_are_placed_once_and_let_go() -> None:
    composed = ComposedSurrogate.of(surrogate("linear", 0, HIDDEN))
    like = {"weight": torch.empty(HIDDEN, HIDDEN), "bias": torch.empty(HIDDEN)}
    placed, sublayer = SurrogateTensors(), SUBLAYERS[0]
    one = placed.get(sublayer, composed, like)
    assert placed.get(sublayer, ComposedSurrogate.of(surrogate("linear", 0, HIDDEN)), like) is one
    half = {n: t.half() for n, t in like.items()}
    assert placed.get(sublayer, composed, half)["bias"].dtype == torch.float16
    del one
    assert not [k for k in placed._known if torch.float32 in k]


def test_surrogates_of_another_model_are_refused() -> None:
    like = {"weight": torch.empty(8, 8), "bias": torch.empty(8)}
    with pytest.raises(
        PlanError, match=r"^0\.attention: weight of its linear surrogate has shape "
    ):
        SurrogateTensors().get(
            SUBLAYERS[0], ComposedSurrogate.of(surrogate("linear", 0, HIDDEN)), like
        )
