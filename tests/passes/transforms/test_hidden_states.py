"""HiddenStates: the stream between layers and what the head reads, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes import Replacement, Skip, UnsupportedError, link, run_passes
from adaskip_passes.infra.graph_module import copied
from adaskip_passes.partition.outer import piece_of
from adaskip_passes.transforms.hidden_states import HiddenStates
from tests.support.fx_decoders import SHAPES, Cut, Shape, arguments, call, shared
from tests.support.fx_reference import Instead, eager, same


def recorded(got: Cut, skipped: tuple[int, ...] = ()) -> fx.GraphModule:
    skips = Skip({i: Replacement("nothing", "scale") for i in skipped})
    return run_passes(got.outer, (HiddenStates(), skips))


def run(got: Cut, outer: fx.GraphModule, args: Any, **factors: float) -> tuple[Tensor, ...]:
    extra = {k: torch.tensor(v) for k, v in factors.items()}
    results: tuple[Tensor, ...] = call(link(outer, got.compiler), got, outer.graph, args, extra)
    return results


@torch.no_grad()
def expected_states(args: Any, instead: dict[int, Instead]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the hidden states as transformers counts them."""
    streams: list[Tensor] = []
    logits = eager(args, instead, streams)
    return logits, [*streams[:-1:2], args["model"].norm(streams[-1])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("skipped", [(), (0,), (1,)], ids=str)
def test_hidden_states_are_those_of_the_stream(shape: Shape, skipped: tuple[int, ...]) -> None:
    got = shared(shape)
    args, twin = (arguments(got.model, shape, tokens=5, seed=3) for _ in range(2))
    outer = recorded(got, skipped)
    logits, *states = run(got, outer, args, **{f"factor_{i}": 1.25 for i in skipped})
    wanted, expected = expected_states(twin, {i: Instead(1.25) for i in skipped})
    assert torch.equal(logits, wanted)
    assert same(args, twin)
    assert len(states) == shape.layers + 1
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_the_stream_before_the_norm_is_another() -> None:
    """The companion."""
    got = shared(Shape())
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    streams: list[Tensor] = []
    eager(twin, streams=streams)
    *_, last = run(got, recorded(got), args)
    assert not torch.allclose(last, streams[-1])


def test_the_captured_graph_stays_as_it_was() -> None:
    got = shared(Shape())
    before = [(n.name, n.args) for n in got.outer.graph.nodes]
    assert len(recorded(got).graph.nodes) == len(before) + 1
    assert [(n.name, n.args) for n in got.outer.graph.nodes] == before


@pytest.mark.parametrize(
    ("role", "message"),
    [("epilogue", "the graph has no epilogue"), ("stream", "does not read the residual stream")],
)
def test_a_graph_that_ends_otherwise_is_refused(role: str, message: str) -> None:
    outer = copied(shared(Shape()).outer)
    (end,) = (n for n in outer.graph.nodes if (p := piece_of(n)) and p.role == "epilogue")
    if role == "epilogue":
        end.replace_all_uses_with(end.args[0])
        outer.graph.erase_node(end)
    else:
        end.args = (outer.graph.find_nodes(op="placeholder")[0], *end.args[1:])
    with pytest.raises(UnsupportedError, match=message):
        HiddenStates()(outer)
