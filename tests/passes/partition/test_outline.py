"""Outline: the same computation in pieces, equal pieces under one key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from adaskip_passes import (
    Replacement,
    Skip,
    UnsupportedError,
    find_sublayers,
    fuse,
    outline,
    run_passes,
)
from adaskip_passes.analysis.structural_key import structural_key
from adaskip_passes.infra.graph_module import text
from adaskip_passes.partition.outer import Piece, piece_of
from tests.support.fx_decoders import (
    ROOM,
    SHAPES,
    Attention,
    Block,
    Cut,
    Decoder,
    Memory,
    Shape,
    Slot,
    arguments,
    call,
    cut,
    cut_block,
    shared,
    step,
    trace,
)
from tests.support.fx_reference import eager, same
from tests.support.symbols import missing_symbols


def pieces(outer: fx.GraphModule) -> dict[str, Piece]:
    found = [piece_of(n) for n in outer.graph.find_nodes(op="call_module")]
    return {p.name: p for p in found if p is not None}


def keys(got: Cut) -> dict[str, str]:
    return {name: piece.key for name, piece in pieces(got.outer).items()}


def operations(piece: Piece) -> list[str]:
    return [n.name for n in piece.module.graph.nodes if n.op.startswith("call")]


def lines(graph_module: fx.GraphModule) -> list[str]:
    return str(graph_module.graph).splitlines()


# The same computation --------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["BranchInPlace", "Dropped", "Multiplied", "Sandwich"])
def test_fused_has_the_text_of_the_capture_for_each_way_to_join(block: str) -> None:
    got = shared(Shape(block=block))
    assert str(fuse(got.outer).graph) == str(got.capture.graph.graph)


def test_a_stream_that_is_overwritten_gets_results_of_its_own() -> None:
    """Otherwise nothing could be measured before and after; all else has the same text."""
    got = shared(Shape(block="InPlace"))
    captured = str(got.capture.graph.graph)
    assert "operator.iadd" in captured
    assert str(fuse(got.outer).graph) == captured.replace("operator.iadd", "operator.add")


@given(st.data())
def test_fused_is_the_captured_graph_and_computes_what_the_model_does(data: st.DataObject) -> None:
    """With one layer some shared values have one user and are computed later than captured."""
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    decode = data.draw(st.booleans(), "decode")
    tokens = 1 if decode else data.draw(st.integers(2, 20), "tokens")
    filled = data.draw(st.integers(max(tokens, 2), ROOM - 1), "filled")
    got = shared(shape, 1, 9) if decode else shared(shape)
    flat = fuse(got.outer)
    assert sorted(lines(flat)) == sorted(lines(got.capture.graph))
    if shape.layers > 1:
        assert lines(flat) == lines(got.capture.graph)
    args = arguments(got.model, shape, tokens, filled, seed=filled)
    twin = arguments(got.model, shape, tokens, filled, seed=filled)
    assert torch.equal(call(flat, got, flat.graph, args)[0], eager(twin))
    assert same(args, twin)


def test_another_graph_has_another_text() -> None:
    got = shared(Shape())
    skipped = fuse(run_passes(got.outer, (Skip({1: Replacement()}),)))
    assert str(skipped.graph) != str(got.capture.graph.graph)
    assert str(shared(Shape(block="PostNorm")).capture.graph.graph) != str(got.capture.graph.graph)


def test_the_captured_graph_is_left_as_it_was() -> None:
    graph_module = trace(step, **arguments(Decoder(Shape()), Shape())).graph
    before = str(graph_module.graph)
    outline(graph_module, find_sublayers(graph_module.graph))
    assert str(graph_module.graph) == before
    graph_module.graph.lint()


# The outer graph -------------------------------------------------------------------------------

OUTER = """\
x, table = prologue(+5 inputs)
x_1 = layers_0_attention(x, table, +7 inputs)
x_2 = layers_0_ffn(x_1, +6 inputs)
x_3 = layers_1_attention(x_2, table, +7 inputs)
x_4 = layers_1_ffn(x_3, +6 inputs)
epilogue = epilogue(x_4, +3 inputs)
return (epilogue,)"""

DECODE = """\
prologue = prologue(+2 inputs)
x_1 = layers_0_attention(prologue, +8 inputs)
x_2 = layers_0_ffn(x_1, +5 inputs)
epilogue = epilogue(x_2, +2 inputs)
return (epilogue,)"""


def test_the_outer_graph_as_text() -> None:
    assert text(shared(Shape()).outer) == OUTER
    assert text(shared(Shape(layers=1), 1, 9).outer) == DECODE


def test_what_a_piece_is_called_with() -> None:
    """The stream, then what the prologue shares out, then inputs of the captured graph."""
    got = shared(Shape())
    attention, ffn = (pieces(got.outer)[f"layers_0_{k}"] for k in ("attention", "ffn"))
    assert [n.name for n in attention.module.graph.find_nodes(op="placeholder")] == [
        "x",
        "table",
        "norm1_weight",
        "qkv_weight",
        "s27",
        "l_memory_slots_0_count",
        "l_memory_slots_0_keys",
        "l_memory_slots_0_values",
        "out_weight",
    ]
    assert next(iter(ffn.module.graph.nodes)).name == "x_1"
    assert (attention.role, attention.index, attention.layer, attention.kind) == (
        "sublayer",
        0,
        0,
        "attention",
    )
    assert (ffn.index, ffn.kind, ffn.outputs) == (1, "ffn", 1)


def test_the_outer_graph_has_the_captured_inputs_in_order() -> None:
    got = shared(Shape())
    inner, outer = (
        g.find_nodes(op="placeholder") for g in (got.capture.graph.graph, got.outer.graph)
    )
    assert [n.name for n in outer] == [n.name for n in inner]
    assert [n.target for n in outer] == [n.target for n in inner]


def test_symbols_of_shapes_are_inputs_of_every_piece() -> None:
    """A compiler looks symbols up among the integer inputs."""
    for piece in pieces(shared(Shape()).outer).values():
        assert not missing_symbols(piece), piece.name


def test_two_inputs_with_one_short_name() -> None:
    """Two experts have an ``up.weight`` each."""
    got = shared(Shape(block="Routed"))
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    assert torch.equal(call(fuse(got.outer), got, got.outer.graph, args)[0], eager(twin))


# Keys ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_number_of_keys_does_not_depend_on_depth() -> None:
    """Prologue, attention, FFN, epilogue: what is compiled for one layer serves all."""
    counts = {}
    for layers in (1, 2, 4):
        got = shared(Shape(layers=layers, hidden=4, heads=1))
        assert len(pieces(got.outer)) == 2 * layers + 2
        counts[layers] = len(set(keys(got).values()))
    assert counts == {1: 4, 2: 4, 4: 4}


class Uneven(Decoder):
    """The FFN of its second layer is wider."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        layers: Any = self.layers
        layers[1].mlp.up = nn.Linear(shape.hidden, 3 * shape.hidden)
        layers[1].mlp.down = nn.Linear(3 * shape.hidden, shape.hidden)


def test_layers_that_differ_have_keys_of_their_own() -> None:
    shape = Shape(layers=3)
    found = keys(cut(Uneven(shape), shape))
    assert found["layers_0_ffn"] == found["layers_2_ffn"] != found["layers_1_ffn"]
    assert found["layers_0_attention"] == found["layers_1_attention"]


def test_equal_models_have_equal_keys() -> None:
    shape = Shape(layers=1)
    assert keys(cut(Decoder(shape), shape)) == keys(shared(shape))


@pytest.mark.parametrize(
    ("changed", "unchanged"),
    [
        ({"eps": 1e-6}, {"prologue"}),
        ({"hidden": 16}, set()),
        ({"dtype": torch.bfloat16}, set()),
        ({"batch": 3}, set()),
        ({"vocab": 12}, {"layers_0_attention", "layers_0_ffn"}),
        ({"heads": 4}, {"prologue", "layers_0_ffn", "epilogue"}),
        ({"block": "Multiplied"}, {"prologue", "epilogue"}),
        ({"block": "Gelu"}, {"prologue", "epilogue", "layers_0_attention"}),
    ],
)
def test_keys_tell_shapes_dtypes_and_constants_apart(
    changed: dict[str, Any], unchanged: set[str]
) -> None:
    base = Shape(layers=1)
    before, after = keys(shared(base)), keys(shared(replace(base, **changed)))
    assert {name for name in before if before[name] == after[name]} == unchanged


def one_node(
    function: Callable[..., Any], *constants: Any, example: Tensor | None = None, name: str = "x"
) -> str:
    graph = fx.Graph()
    x = graph.placeholder(name)
    x.meta["example_value"] = torch.ones(2, 3) if example is None else example
    graph.output(graph.call_function(function, (x, *constants)))
    return structural_key(fx.GraphModule(nn.Module(), graph))


def times(factor: float) -> Callable[[Tensor], Tensor]:
    def multiply(x: Tensor) -> Tensor:
        return x * factor

    return multiply


DOUBLE = times(2.0)


def test_a_key_is_of_code_and_not_of_names() -> None:
    assert one_node(torch.mul, 2.0) == one_node(torch.mul, 2.0, name="other")
    assert one_node(DOUBLE) == one_node(DOUBLE)


@pytest.mark.parametrize(
    "other",
    [
        lambda: one_node(torch.mul, 2),
        lambda: one_node(torch.mul, 2.5),
        lambda: one_node(torch.mul, True),
        lambda: one_node(torch.add, 2.0),
        lambda: one_node(torch.ops.aten.mul.Tensor, 2.0),
        lambda: one_node(torch.mul, 2.0, example=torch.ones(2, 4)),
        lambda: one_node(torch.mul, 2.0, example=torch.ones(3, 2).t()),
        lambda: one_node(torch.mul, 2.0, example=torch.ones(2, 3, dtype=torch.float64)),
        lambda: one_node(torch.mul, 2.0, example=torch.ones(2, 3, device="meta")),
        lambda: one_node(torch.mul, 2.0, example=torch.ones(2, 3, requires_grad=True)),
    ],
)
def test_a_key_is_of_operation_constants_and_inputs(other: Callable[[], str]) -> None:
    assert other() != one_node(torch.mul, 2.0)


def test_functions_of_one_name_but_another_closure_have_other_keys() -> None:
    """Sharing one compiled piece between them would compute a wrong answer."""
    assert one_node(times(2.0)) != one_node(times(3.0))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((slice(0, 2),), (slice(0, 3),)),
        (((0, 1),), ([0, 1],)),
        ((None,), (Ellipsis,)),
        ((torch.float32,), (torch.float16,)),
        ((1e-5,), (1e-6,)),
    ],
)
def test_keys_tell_arguments_apart(one: Any, other: Any) -> None:
    assert one_node(torch.narrow, *one) == one_node(torch.narrow, *one)
    assert one_node(torch.narrow, *one) != one_node(torch.narrow, *other)


def with_constant(value: Any) -> str:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2)
    root = nn.Module()
    root.constant = value
    graph.output(graph.call_function(torch.add, (x, graph.get_attr("constant"))))
    return structural_key(fx.GraphModule(root, graph))


def doubled(factor: float) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.mul, (graph.placeholder("x"), factor)))
    return fx.GraphModule(nn.Module(), graph)


def test_constants_and_subgraphs_count_by_content() -> None:
    assert with_constant(torch.ones(2)) == with_constant(torch.ones(2))
    assert with_constant(torch.ones(2)) != with_constant(torch.zeros(2))
    assert with_constant(torch.ones(2)) != with_constant(torch.ones(2, dtype=torch.bfloat16))
    assert with_constant(doubled(2.0)) == with_constant(doubled(2.0))
    assert with_constant(doubled(2.0)) != with_constant(doubled(3.0))


# Where things are computed ---------------------------------------------------------------------


def test_shared_tables_are_hoisted_and_single_uses_sunk() -> None:
    found = pieces(shared(Shape()).outer)
    assert "cos" in operations(found["prologue"])
    assert "arange_1" in operations(found["layers_0_attention"])
    assert not any(name.startswith("arange_") for name in operations(found["prologue"]))
    assert not any("cos" in operations(p) for name, p in found.items() if name != "prologue")


class Biased(Decoder):
    """Bloom: a bias that the first layer makes and all layers read."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        layers: Any = self.layers
        x, table = self.embed(ids), None
        for layer, slot in zip(layers, memory.slots, strict=True):
            h = layer.norm1(x)
            table = torch.sin(self.table(0, ids.shape[1])) if table is None else table
            x = x + layer.self_attn(h, table, slot, 0)
            x = x + layer.feed(x)
        return self.head(self.norm(x))


def test_what_the_first_layer_makes_for_all_is_hoisted() -> None:
    """Otherwise the first attention could not be skipped."""
    shape = Shape()
    got = cut(Biased(shape), shape)
    found = pieces(got.outer)
    assert {"cos", "table"} & set(operations(found["prologue"]))
    assert all(p.outputs == 1 for p in found.values() if p.role == "sublayer")
    args, twin = (arguments(got.model, shape) for _ in range(2))
    flat = fuse(got.outer)
    with torch.no_grad():
        expected = got.model(twin["ids"], twin["memory"])
    assert torch.equal(call(flat, got, flat.graph, args)[0], expected)
    assert same(args, twin)


class TwoHeads(Decoder):
    """The stream after every layer has logits of its own."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        x, table = self.embed(ids), self.table(0, ids.shape[1])
        logits = self.head(x)
        for layer, slot in zip(self.layers, memory.slots, strict=True):
            x = layer(x, table, slot, 0)
            logits = logits + self.head(self.norm(x))
        return logits


def test_what_is_made_aside_of_the_branches_is_computed_where_it_is_read() -> None:
    """Otherwise every sublayer would hand on more than the stream, and none could be skipped."""
    shape = Shape()
    got = cut(TwoHeads(shape), shape)
    found = pieces(got.outer)
    assert all(p.outputs == 1 for p in found.values() if p.role == "sublayer")
    plain = keys(shared(shape))
    assert {n: k for n, k in keys(got).items() if n in found and found[n].role == "sublayer"} == {
        n: k for n, k in plain.items() if n.startswith("layers")
    }
    args, twin = (arguments(got.model, shape) for _ in range(2))
    flat = fuse(got.outer)
    with torch.no_grad():
        expected = got.model(twin["ids"], twin["memory"])
    torch.testing.assert_close(call(flat, got, flat.graph, args)[0], expected)
    assert same(args, twin)


class Unread(Block):
    """Computes something that nobody reads."""

    def feed(self, x: Tensor) -> Tensor:
        torch.arange(3)
        return super().feed(x)


def test_what_nobody_reads_stays_in_its_place() -> None:
    """Also in the piece that goes when its sublayer is skipped."""
    found = pieces(cut_block(Unread).outer)
    counts = {n: sum("arange" in o for o in operations(p)) for n, p in found.items()}
    assert counts == {
        "prologue": 1,
        "layers_0_attention": 2,
        "layers_0_ffn": 0,
        "layers_1_attention": 2,
        "layers_1_ffn": 0,
        "epilogue": 0,
    }


class FromEmbeddings(Decoder):
    """The stream is an input of the graph."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        x = memory.embeddings  # type: ignore[attr-defined]
        for layer, slot in zip(self.layers, memory.slots, strict=True):
            x = layer(x, self.get_buffer("frequencies"), slot, 0)
        return self.head(self.norm(x))


def test_the_stream_may_be_an_input() -> None:
    shape = Shape()
    model = FromEmbeddings(shape)
    args, twin = (arguments(model, shape) for _ in range(2))
    for one in (args, twin):
        one["memory"].embeddings = model.embed(one["ids"])
    captured = trace(step, **args)
    found = find_sublayers(captured.graph.graph)
    outer = outline(captured.graph, found)
    assert text(outer).splitlines()[0] == "x_1 = layers_0_attention(+8 inputs)"
    flat = fuse(outer)
    bound = captured.binder(captured.sources)(args)
    assert torch.equal(flat(*bound)[0], model(twin["ids"], twin["memory"]))
    assert same(args, twin)


# Order of effects ------------------------------------------------------------------------------


def computes_or_refuses(model: Decoder, shape: Shape, make: Callable[[], dict[str, Any]]) -> str:
    """The message with which outlining is refused; "" when the pieces compute what `model` does."""
    captured = trace(step, **make())
    try:
        outer = outline(captured.graph, find_sublayers(captured.graph.graph))
    except UnsupportedError as error:
        return str(error)
    args, twin = make(), make()
    with torch.no_grad():
        result = fuse(outer)(*captured.binder(captured.sources)(args))[0]
        assert torch.equal(result, model(twin["ids"], twin["memory"]))
    assert same(args, twin)
    return ""


def reordered(name: str) -> str:
    return (
        f"{name} is written in place and read by several sublayers in an order that cutting the "
        "graph would change."
    )


def test_writes_stay_in_the_attention_that_makes_them() -> None:
    for name, piece in pieces(shared(Shape()).outer).items():
        methods = [str(n.target) for n in piece.module.graph.nodes if n.op == "call_method"]
        writes = [m for m in methods if m.endswith("_")]
        assert writes == (["index_copy_", "index_copy_", "add_"] if "attention" in name else [])


class ReadsBefore(Decoder):
    """The logits are scaled by what a counter said before the first layer added to it."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        before = memory.slots[0].count.clone()
        return super().forward(ids, memory) * (1 + before)


class ReadsAfter(Decoder):
    """The logits are scaled by what it says in the end."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        logits = super().forward(ids, memory)
        return logits * (1 + memory.slots[0].count)


def test_a_read_is_not_moved_behind_a_write() -> None:
    shape = Shape(layers=1)
    refused = computes_or_refuses(
        ReadsBefore(shape), shape, lambda: arguments(ReadsBefore(shape), shape, 7, 9)
    )
    assert refused in ("", reordered("l_memory_slots_0_count"))


def test_a_read_after_a_write_is_understood() -> None:
    shape = Shape(layers=1)
    model = ReadsAfter(shape)
    assert computes_or_refuses(model, shape, lambda: arguments(model, shape, 7, 9)) == ""


class CountsAll(Attention):
    """All layers add to one counter, and read it before and after."""

    def store(self, slot: Slot, k: Tensor, v: Tensor) -> None:
        total: Tensor = slot.total  # type: ignore[attr-defined]
        slot.keys.add_(total)
        total.add_(1)
        slot.values.add_(total)


class Counting(Block):
    attention = CountsAll


@pytest.mark.parametrize("layers", [1, 3])
def test_one_counter_of_all_layers(layers: int) -> None:
    shape = Shape(layers=layers)
    model = Decoder(shape, Counting)

    def make() -> dict[str, Any]:
        args = arguments(model, shape)
        total = torch.zeros(1)
        for slot in args["memory"].slots:
            slot.total = total
        return args

    refused = computes_or_refuses(model, shape, make)
    assert refused in ("", reordered("l_memory_slots_0_total"))
    assert refused == "" or layers > 1


class Late(Block):
    """Its input is scaled by a value that was read from a buffer before all layers."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + self.mlp(self.norm2(x) * table.sum())


class WritesBetweenReads(Decoder):
    """One buffer: read for the second layer, written, read for the first."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        buffer = memory.slots[0].keys[0, 0, 0]
        second = torch.relu(buffer)
        buffer.mul_(2)
        first = torch.relu(buffer)
        x = self.embed(ids)
        x = self.layers[0](x, first, memory.slots[1], 0)
        x = self.layers[1](x, second, memory.slots[1], 0)
        return self.head(self.norm(x))


def test_a_write_between_reads_for_later_pieces() -> None:
    """Sinking either read to its only user would move it past the write."""
    shape = Shape()
    model = WritesBetweenReads(shape, Late)

    def make() -> dict[str, Any]:
        args = arguments(model, shape)
        args["memory"].slots[0].keys.fill_(1.0)
        return args

    refused = computes_or_refuses(model, shape, make)
    assert refused in ("", reordered("l_memory_slots_0_keys"))


class ReadsBack(Decoder):
    """A value of the first layer is multiplied by a counter after the second has added to it."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        first = self.embed(ids)
        x, table = first, self.table(0, ids.shape[1])
        for layer, slot in zip(self.layers, memory.slots, strict=True):
            x = layer(x, table, slot, 0)
        late = torch.tanh(first) * memory.slots[1].count
        return self.head(self.norm(x) * late)


def test_an_order_that_no_cut_can_keep_is_refused() -> None:
    """What depends on the stream before layer 0 alone would be computed there, too early."""
    shape = Shape()
    model = ReadsBack(shape)
    refused = computes_or_refuses(model, shape, lambda: arguments(model, shape))
    assert refused == reordered("l_memory_slots_1_count")


class KeepsAView(Block):
    """The FFN reads a view of the stream that was made before attention overwrote the stream."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        view = x.view(x.shape)
        x += self.attend(x, table, slot, start)
        return x + self.mlp(self.norm2(x) * view)


def test_an_overwritten_stream_may_have_other_names() -> None:
    """In the eager model the view shows the new stream."""
    shape = Shape(layers=1)
    model = Decoder(shape, KeepsAView)
    refused = computes_or_refuses(model, shape, lambda: arguments(model, shape))
    assert refused == "" or "overwritten in place and read afterwards" in refused


class OldName(Block):
    """The same, by the old name itself."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        y = torch.Tensor.add_(x, self.attend(x, table, slot, start))
        return y + self.mlp(self.norm2(y) * x)


def test_an_overwritten_stream_read_by_its_old_name() -> None:
    shape = Shape(layers=1)
    model = Decoder(shape, OldName)
    refused = computes_or_refuses(model, shape, lambda: arguments(model, shape))
    assert refused in (
        "",
        "layers.0.self_attn: the residual stream is overwritten in place and read afterwards by "
        "its old name",
    )
