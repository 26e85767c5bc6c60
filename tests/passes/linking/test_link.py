"""Link and fuse: two ways to run an outer graph, with equal results and few compilations."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from adaskip_passes import PieceCompiler, Probe, Replacement, Skip, fuse, link, run_passes
from adaskip_passes.partition.outer import Piece, piece_of
from adaskip_passes.transforms.probe import VALID
from tests.support.fx_decoders import (
    SHAPES,
    Block,
    Cut,
    Decoder,
    Memory,
    Shape,
    Slot,
    arguments,
    call,
    cut,
    shared,
)
from tests.support.fx_reference import Instead, eager, same


def rewritten(got: Cut, *skipped: int, probes: tuple[int, ...] = ()) -> fx.GraphModule:
    how = {i: Replacement("counters", "scale") for i in skipped}
    return run_passes(got.outer, (Skip(how), Probe(probes)))


def extra(got: Cut, tokens: int, *skipped: int, probes: tuple[int, ...] = ()) -> dict[str, Tensor]:
    named = {f"factor_{i}": torch.tensor(1.0 + i / 8) for i in skipped}
    valid = {VALID: torch.ones(got.shape.batch, tokens, dtype=torch.bool)}
    return {**named, **(valid if probes else {})}


# Equal results ---------------------------------------------------------------------------------


@given(st.data())
def test_linked_is_fused_is_captured(data: st.DataObject) -> None:
    """Bit by bit, for any plan; and without a plan they are the captured graph."""
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    tokens = data.draw(st.sampled_from([1, 2, 8]), "tokens")
    got = shared(shape, 1, 9) if tokens == 1 else shared(shape)
    places = st.integers(0, 2 * shape.layers - 1)
    skipped = sorted(data.draw(st.sets(places), "skipped"))
    left = [i for i in range(2 * shape.layers) if i not in skipped]
    probes = (
        tuple(data.draw(st.lists(st.sampled_from(left), unique=True), "probes")) if left else ()
    )
    outer = rewritten(got, *skipped, probes=probes)
    named = extra(got, tokens, *skipped, probes=probes)
    one, two = (arguments(got.model, shape, tokens, 9, seed=tokens) for _ in range(2))
    linked = call(link(outer, got.compiler), got, outer.graph, one, named)
    fused = call(fuse(outer), got, outer.graph, two, named)
    assert len(linked) == len(fused) == (2 if probes else 1)
    assert all(torch.equal(a, b) for a, b in zip(linked, fused, strict=True))
    assert same(one, two)
    if not skipped:
        three = arguments(got.model, shape, tokens, 9, seed=tokens)
        captured = call(got.capture.graph, got, got.capture.graph.graph, three)
        assert torch.equal(linked[0], captured[0])
        assert same(one, three)


def test_another_plan_is_another_function() -> None:
    got = shared(Shape())
    results = []
    for skipped in ((), (0,), (1,), (0, 1)):
        outer = rewritten(got, *skipped)
        args = arguments(got.model, got.shape)
        program = link(outer, got.compiler)
        results.append(call(program, got, outer.graph, args, extra(got, 7, *skipped))[0])
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[i + 1 :])


def test_an_outer_graph_runs_by_itself_for_debugging() -> None:
    got = shared(Shape())
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    assert torch.equal(call(got.outer, got, got.outer.graph, args)[0], eager(twin))
    assert same(args, twin)


class Recalling(Decoder):
    """Later sublayers read the embedding again, besides the stream."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        start = memory.filled.shape[0] - ids.shape[1]
        x = first = self.embed(ids)
        table = self.table(start, ids.shape[1])
        for layer, slot in zip(self.layers, memory.slots, strict=True):
            x = layer(x, table, slot, first)
        return self.head(self.norm(x))


class Recall(Block):
    def forward(self, x: Tensor, table: Tensor, slot: Slot, first: Any) -> Tensor:
        x = x + self.attend(x, table, slot, 0)
        return x + self.mlp(torch.maximum(self.norm2(x), first))


@functools.cache
def recalling() -> Cut:
    return cut(Recalling(Shape(), Recall), Shape())


@pytest.mark.parametrize("skipped", [(), (0,), (0, 1), (2,)])
@pytest.mark.parametrize("how", [fuse, lambda outer: None], ids=["fused", "linked"])
def test_a_value_may_be_handed_over_twice(
    how: Callable[[fx.GraphModule], Any], skipped: tuple[int, ...]
) -> None:
    """With layer 0's attention skipped, its FFN gets the embedding as stream and as embedding."""
    got = recalling()
    outer = run_passes(got.outer, (Skip({i: Replacement("nothing") for i in skipped}),))
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    result = call(how(outer) or link(outer, got.compiler), got, outer.graph, args)[0]
    with torch.no_grad():
        x = first = got.model.embed(twin["ids"])
        table = got.model.table(0, 7)
        for i, (layer, slot) in enumerate(zip(got.model.layers, twin["memory"].slots, strict=True)):
            assert isinstance(layer, Recall)
            if 2 * i not in skipped:
                x = x + layer.attend(x, table, slot, 0)
            if 2 * i + 1 not in skipped:
                x = x + layer.mlp(torch.maximum(layer.norm2(x), first))
        expected = got.model.head(got.model.norm(x))
    assert torch.equal(result, expected)


# How much is compiled --------------------------------------------------------------------------


def test_a_second_plan_compiles_no_sublayer() -> None:
    shape = Shape(layers=2)
    got = cut(Decoder(shape), shape)
    link(got.outer, got.compiler)
    assert got.compiler.compiled == 4
    link(got.outer, got.compiler)
    assert got.compiler.compiled == 4
    link(run_passes(got.outer, (Skip({0: Replacement("nothing")}),)), got.compiler)
    assert got.compiler.compiled == 4
    link(rewritten(got, 0), got.compiler)
    assert got.compiler.compiled == 6, "the scale, and what is left of attention"
    for skipped in ((1,), (0, 3), (2, 3), (0, 1, 2)):
        link(rewritten(got, *skipped), got.compiler)
    assert got.compiler.compiled == 6
    assert got.compiler.seconds > 0


def test_each_key_is_compiled_once() -> None:
    got = shared(Shape(layers=4, hidden=4, heads=1))
    asked: list[Piece] = []

    class Recording(PieceCompiler):
        def __call__(self, piece: Piece) -> Callable[..., Any]:
            asked.append(piece)
            function = super().__call__(piece)
            assert callable(function)
            return function

    compiler = Recording(got.capture, "eager")
    link(got.outer, compiler)
    assert len(asked) == 10
    assert compiler.compiled == len({p.key for p in asked}) == 4
    other = PieceCompiler(got.capture, "eager")
    link(got.outer, other)
    assert other.compiled == 4, "compiled pieces belong to their compiler"


def test_layers_that_share_code_use_their_own_weights() -> None:
    """One compiled attention, yet the second layer's weights matter."""
    got = shared(Shape())
    other = Decoder(got.shape)
    with torch.no_grad():
        for parameter in other.layers[1].parameters():
            parameter.mul_(1.25)
    args, twin = arguments(other, got.shape), arguments(other, got.shape)
    result = call(link(got.outer, got.compiler), got, got.outer.graph, args)[0]
    assert torch.equal(result, eager(twin))
    assert not torch.equal(result, eager(arguments(got.model, got.shape)))


def test_compiling_leaves_the_piece_as_it_was() -> None:
    """Compilers take ownership of the graph that they are given."""
    shape = Shape(layers=1)
    got = cut(Decoder(shape), shape, backend="aot_eager")
    piece = piece_of(got.outer.graph.find_nodes(op="call_module")[1])
    assert piece is not None
    before = str(piece.module.graph)
    got.compiler(piece)
    assert str(piece.module.graph) == before


# Backends --------------------------------------------------------------------------------------


def backend_agrees(backend: str, tolerance: float) -> PieceCompiler:
    """Pieces compiled at one length, with and without a plan, run at others as eager does."""
    shape = Shape(layers=2)
    got = cut(Decoder(shape), shape, backend=backend)
    outer = rewritten(got, 1, 2, probes=(0, 3))
    plain, planned = link(got.outer, got.compiler), link(outer, got.compiler)
    guards = got.capture.shape_guards()
    for tokens in (7, 12):
        args, twin = (arguments(got.model, shape, tokens) for _ in range(2))
        assert guards.hold(args)
        result = call(plain, got, got.outer.graph, args)[0]
        np.testing.assert_allclose(result, eager(twin), rtol=tolerance, atol=tolerance)
        for one, two in zip(args["memory"].tensors(), twin["memory"].tensors(), strict=True):
            np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)
        args, twin = (arguments(got.model, shape, tokens) for _ in range(2))
        named = extra(got, tokens, 1, 2, probes=(0, 3))
        logits, measured = call(planned, got, outer.graph, args, named)
        expected = eager(twin, {1: Instead(1.125), 2: Instead(1.25, "counters")})
        np.testing.assert_allclose(logits, expected, rtol=tolerance, atol=tolerance)
        assert measured.shape == (2, shape.batch, 5)
        assert torch.equal(args["memory"].slots[1].count, torch.tensor([tokens]))
        assert not args["memory"].slots[1].keys.any()
    return got.compiler


def test_pieces_compile_with_aot_eager() -> None:
    assert backend_agrees("aot_eager", 1e-6).compiled == 7


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_pieces_compile_with_inductor() -> None:
    assert backend_agrees("inductor", 1e-5).compiled == 7


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(Exception, match="no_such_backend"):
        PieceCompiler(shared(Shape()).capture, "no_such_backend")


# Programs --------------------------------------------------------------------------------------


def test_a_stream_is_let_go_when_its_last_reader_has_run() -> None:
    """The streams of a long prompt would otherwise all be alive at the end."""
    got = shared(Shape(layers=4, hidden=4, heads=1))
    alive: list[int] = []
    made: list[weakref.ref[Tensor]] = []

    def watched(piece: Piece) -> Callable[..., Any]:
        function = got.compiler(piece)

        def run(*inputs: Any) -> Any:
            result = function(*inputs)
            alive.append(sum(r() is not None for r in made))
            if piece.role == "sublayer":
                made.append(weakref.ref(result))
            return result

        return run

    args = arguments(got.model, got.shape)
    gc.collect()
    call(link(got.outer, watched), got, got.outer.graph, args)
    assert len(made) == 8
    assert max(alive) == 1
    gc.collect()
    assert not any(r() is not None for r in made)


def test_a_program_can_be_run_again() -> None:
    got = shared(Shape())
    program = link(got.outer, got.compiler)
    first, second = (
        call(program, got, got.outer.graph, arguments(got.model, got.shape))[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_program_gives_a_tuple() -> None:
    got = shared(Shape())
    results = call(
        link(got.outer, got.compiler), got, got.outer.graph, arguments(got.model, got.shape)
    )
    assert isinstance(results, tuple)
    assert len(results) == 1


def test_two_results_one_of_which_is_an_input() -> None:
    """What the outer graph returns may be any of its values."""
    got = shared(Shape())
    outer = run_passes(got.outer, ())
    ids = next(n for n in outer.graph.find_nodes(op="placeholder") if n.name == "l_ids_")
    output = outer.graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple | list)
    output.args = ((*results, ids),)
    args = arguments(got.model, got.shape)
    logits, same_ids = call(link(outer, got.compiler), got, outer.graph, args)
    assert same_ids is args["ids"]
    assert logits.shape == (2, 7, 11)
