"""Captured graphs are bounded: those that no program needs go first, by when they were needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.programs import program_cache
from adaskip_fx.programs.kept_graphs import MOST_GRAPHS, KeptGraphs
from adaskip_fx.programs.variants import Counters, VariantCache
from tests.support.compiled_llamas import make_model
from tests.support.eager_reference import assert_close


@dataclass(eq=False)
class Compiler:
    compiled: int = 3
    seconds: float = 0.5


@dataclass(eq=False)
class Graph:
    key: str
    compiler: Compiler = field(default_factory=Compiler)


class State:
    def __init__(self) -> None:
        self.captures: dict[str, list[Graph]] = {}

    def add(self, graph: Graph) -> Graph:
        self.captures.setdefault(graph.key, []).append(graph)
        return graph


class States:
    def __init__(self) -> None:
        self.known = [State(), State()]


def kept_in(states: States, limit: int) -> KeptGraphs:
    return KeptGraphs(cast(Any, states), limit)


def test_what_was_needed_last_is_kept() -> None:
    states = States()
    a, b, c, d = (states.known[i % 2].add(Graph(name)) for i, name in enumerate("abcd"))
    kept = kept_in(states, 2)
    for graph in (c, a, b):  # in which order they lost their programs; d never had one
        kept.lost_program(cast(Any, graph))
    kept.trim([cast(Any, d)])
    assert set(kept.all()) == {b, d}
    assert (kept.dropped, kept.pieces, kept.seconds) == (2, 6, 1.0)


def test_what_is_needed_is_kept_whatever_the_limit() -> None:
    states = States()
    a, b, c = (states.known[0].add(Graph("one key")) for _ in range(3))
    kept = kept_in(states, 1)
    seen = states.known[0].captures["one key"]
    kept.trim([cast(Any, a), cast(Any, c)])
    assert kept.all() == [a, c]
    assert seen == [a, b, c], "who reads the list meanwhile sees all of it"
    kept.trim([])
    assert len(kept.all()) == 1


def test_a_dropped_program_is_told() -> None:
    told: list[Any] = []
    cache = VariantCache(1, Counters(), told.append)
    for name in "ab":
        program: Any = type("P", (), {"captured": Graph(name), "runs": (), "seconds": 0.0})()
        program.captured.key = type("K", (), {"phase": "prefill"})()
        program.captured.sublayers = ()
        cache.get(name, lambda program=program: program)
    assert [graph.key.phase for graph in told] == ["prefill"]
    assert len(cache.captured()) == 1


@torch.no_grad()
def test_requests_are_right_and_graphs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of five kinds in turn, with room for three graphs and two programs."""
    assert MOST_GRAPHS >= 32, "as many as programs are by default"
    monkeypatch.setattr(program_cache, "MOST_GRAPHS", 3)
    model = make_model("one_layer")
    fast = build(model, None, backend="eager", max_variants=2)
    counters, handle = runtime_of(fast).counters, fast.adaskip
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    pieces = []
    for rows in (1, 2, 1):
        given, cache = ids[:rows], handle.new_cache()
        parts = given[:, :4], given[:, 4:5], given[:, 5:]
        got = torch.cat([fast(input_ids=p, past_key_values=cache).logits for p in parts], 1)
        assert_close(got, model(input_ids=given).logits, 1e-5)
        stats = handle.stats()
        assert stats.graphs <= 4, "the first of all is not counted"
        assert stats.programs <= 2
        pieces.append(stats.pieces_compiled)
    assert counters.captures > 7, "what was dropped is made again"
    assert pieces == sorted(set(pieces)), "and what it had compiled is counted"
