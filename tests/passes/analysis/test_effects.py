"""Effects: which nodes write, to what, and that removing dead code keeps what they write."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from adaskip_passes.analysis.effects import (
    accesses,
    dependencies,
    is_mutation,
    operation,
    storage_root,
    written,
)
from adaskip_passes.transforms.dead_code import EliminateDeadCode, eliminate_dead_code
from tests.support.fx_decoders import Shape, arguments, call, shared


class Graph:
    """A graph under construction: ``g.call("narrow", x, 2, 0, 1)``, ``g.call(torch.add, x, y)``."""

    def __init__(self, *inputs: str) -> None:
        self.graph = fx.Graph()
        self.inputs = [self.graph.placeholder(name) for name in inputs]

    def call(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        return self.graph.call_function(target, args, kwargs)

    def finish(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        return fx.GraphModule(nn.Module(), self.graph)


@pytest.fixture(scope="module")
def stores() -> Iterator[Any]:
    """Custom operators that say in their schemas which argument they write to."""
    library = torch.library.Library("adaskip_tests", "FRAGMENT")
    library.define("store(Tensor(a!) buffer, Tensor value) -> ()")
    library.define("store_last(Tensor value, Tensor(a!) buffer) -> ()")
    yield torch.ops.adaskip_tests
    library._destroy()


def name_of(value: object) -> str:
    """A test id without an address, so that it is the same in every process."""
    return str(getattr(value, "__qualname__", value))


# What writes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "copy_",
        "add_",
        "index_copy_",
        "masked_fill_",
        "relu_",
        operator.setitem,
        operator.iadd,
        operator.imul,
        operator.ipow,
        operator.ilshift,
        torch.relu_,
        torch.ops.aten.copy_,
        torch.ops.aten.add_.Tensor,
    ],
    ids=name_of,
)
def test_these_write_to_their_first_argument(target: str | Callable[..., Any]) -> None:
    g = Graph("x", "y")
    node = g.call(target, *g.inputs)
    assert is_mutation(node)
    assert written(node) is g.inputs[0]


@pytest.mark.parametrize(
    "target",
    [
        "add",
        "__and__",
        "index_copy",
        operator.add,
        operator.getitem,
        torch.add,
        functional.relu,
        functional.silu,
        torch.ops.aten.add,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.copy.default,
    ],
    ids=name_of,
)
def test_these_do_not(target: str | Callable[..., Any]) -> None:
    g = Graph("x", "y")
    node = g.call(target, *g.inputs)
    assert not is_mutation(node)
    assert written(node) is None


def test_inputs_outputs_and_attributes_write_nothing() -> None:
    g = Graph("trailing_")
    attribute = g.graph.get_attr("weight_")
    output = g.graph.output((g.inputs[0],))
    assert not any(is_mutation(n) for n in (g.inputs[0], attribute, output))


def test_operators_may_say_in_their_schema_that_they_write(stores: Any) -> None:
    """Custom cache kernels have no trailing underscore."""
    g = Graph("buffer", "value")
    for target in (stores.store, stores.store.default):
        node = g.call(target, *g.inputs)
        assert is_mutation(node), target
        assert written(node) is g.inputs[0]


def test_what_is_written_need_not_be_the_first_argument(stores: Any) -> None:
    """Cache kernels take the new keys first; ``out=`` is no positional argument at all."""
    g = Graph("value", "other", "buffer")
    value, other, buffer = g.inputs
    assert written(g.call(stores.store_last, value, buffer)) is buffer
    assert written(g.call(stores.store_last.default, value, g.call("narrow", buffer))) is buffer
    assert written(g.call(torch.add, value, other, out=buffer)) is buffer


def test_a_function_may_be_told_to_write_in_place() -> None:
    g = Graph("x")
    (x,) = g.inputs
    assert is_mutation(g.call(functional.relu, x, inplace=True))
    assert not is_mutation(g.call(functional.relu, x, inplace=False))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("index_copy_", "index_copy_"),
        (torch.add, "add"),
        (functional.scaled_dot_product_attention, "scaled_dot_product_attention"),
        (torch._C._nn.linear, "linear"),
        (operator.iadd, "iadd"),
    ],
)
def test_the_name_of_an_operation(target: str | Callable[..., Any], name: str) -> None:
    g = Graph("x")
    assert operation(g.call(target, *g.inputs)) == name
    assert operation(g.graph.call_module("layers.0.mlp")) == "mlp"


# Through views ---------------------------------------------------------------------------------

VIEWS: list[tuple[str | Callable[..., Any], tuple[Any, ...]]] = [
    ("narrow", (0, 0, 1)),
    ("view", (-1,)),
    ("transpose", (0, 1)),
    ("permute", (1, 0)),
    ("unsqueeze", (0,)),
    ("select", (0, 0)),
    ("expand_as", ()),
    ("detach", ()),
    ("t", ()),
    ("flatten", ()),
    ("ravel", ()),
    ("swapdims", (0, 1)),
    (operator.getitem, (0,)),
    (torch.narrow, (0, 0, 1)),
    (torch.transpose, (0, 1)),
    (torch.broadcast_to, ((2, 2),)),
    (getattr, ("mT",)),
    (getattr, ("T",)),
]


@pytest.mark.parametrize(("target", "args"), VIEWS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_writing_to_a_view_writes_to_its_base(
    target: str | Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The list is of what torch itself says shares storage with its first argument."""
    tensor = torch.zeros(2, 2)
    real = (tensor,) if target == "expand_as" else args
    view = getattr(tensor, target)(*real) if isinstance(target, str) else target(tensor, *real)
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    g = Graph("x", "y")
    x, y = g.inputs
    node = g.call(target, x, *args)
    assert storage_root(node) is x
    assert written(g.call("copy_", node, y)) is x


@pytest.mark.parametrize("target", ["clone", "exp", "sum", torch.relu, torch.zeros_like])
def test_what_computes_has_storage_of_its_own(target: str | Callable[..., Any]) -> None:
    g = Graph("x")
    node = g.call(target, *g.inputs)
    assert storage_root(node) is node
    assert written(g.call("zero_", node)) is node


@pytest.mark.parametrize("target", ["chunk", "split", "unbind", "tensor_split"])
def test_parts_of_a_tensor_are_views(target: str) -> None:
    g = Graph("x")
    part = g.call(operator.getitem, g.call(target, g.inputs[0], 2), 0)
    assert storage_root(part) is g.inputs[0]


@given(st.lists(st.sampled_from(["narrow", "view", "add_", "transpose", "mul_"]), max_size=8))
def test_a_chain_of_views_and_writes_leads_to_its_base(chain: list[str]) -> None:
    g = Graph("x")
    node = g.inputs[0]
    for name in chain:
        node = g.call(name, node)
    assert storage_root(node) is g.inputs[0]
    assert storage_root(g.call("view", g.call("exp", node))) is not g.inputs[0]


def test_accesses_are_reads_and_writes_through_any_view() -> None:
    g = Graph("x", "y")
    x, y = g.inputs
    view = g.call("narrow", x, 0, 0, 1)
    write = g.call("copy_", view, y)
    read = g.call("sum", x)
    other = g.call("sum", y)
    copy = g.call("clone", view)
    of_copy = g.call("sum", copy)
    found = accesses(g.graph.nodes, x)
    assert found == [view, write, read, copy]
    assert other not in found
    assert of_copy not in found
    assert accesses(g.graph.nodes, y) == [write, other]


def test_what_must_come_before() -> None:
    """Inputs, and the last write to what a node reads, through any view."""
    g = Graph("x", "y")
    x, y = g.inputs
    early = g.call("sum", x)
    view = g.call("narrow", x, 0, 0, 1)
    first = g.call("copy_", view, y)
    second = g.call("add_", x, 1)
    read = g.call("sum", view)
    other = g.call("sum", y)
    found = dependencies(g.graph.nodes)
    assert {n: set(found[n]) for n in (early, view, first, second, read, other)} == {
        early: {x},
        view: {x},
        first: {view, y},
        second: {x, first},
        read: {view, second},
        other: {y},
    }


# Dead code -------------------------------------------------------------------------------------


def store_and_return() -> fx.GraphModule:
    """``keys.narrow(0, 0, 1).copy_(x + 1)``, something unread, and ``return x * 2``."""
    g = Graph("x", "keys", "unused")
    x, keys, _ = g.inputs
    g.call("copy_", g.call("narrow", keys, 0, 0, 1), g.call(torch.add, x, 1))
    g.call(torch.exp, g.call(torch.sin, x))
    return g.finish(g.call(torch.mul, x, 2))


def names(graph_module: fx.GraphModule) -> list[str]:
    return [n.name for n in graph_module.graph.nodes]


def test_writes_survive_and_what_they_need() -> None:
    gm = store_and_return()
    assert eliminate_dead_code(gm.graph) == 2
    assert names(gm) == ["x", "keys", "unused", "narrow", "add", "copy_", "mul", "output"]
    gm.recompile()
    keys = torch.zeros(2)
    assert gm(torch.ones(1), keys, None)[0].item() == 2.0
    assert keys.tolist() == [2.0, 0.0]


def test_fx_alone_erases_the_write() -> None:
    """Why this package has a removal of its own."""
    gm = store_and_return()
    gm.graph.eliminate_dead_code()
    assert "copy_" not in names(gm)
    gm.recompile()
    keys = torch.zeros(2)
    gm(torch.ones(1), keys, None)
    assert keys.tolist() == [0.0, 0.0]


def test_a_captured_decoder_keeps_its_cache() -> None:
    """And loses it to FX's own removal."""
    got = shared(Shape(layers=1))
    for removed_by_fx in (False, True):
        graph = fx.Graph()
        graph.output(graph.graph_copy(got.capture.graph.graph, {}))
        gm = fx.GraphModule(got.capture.graph, graph)
        if removed_by_fx:
            graph.eliminate_dead_code()
        else:
            assert eliminate_dead_code(graph) == 0
        gm.recompile()
        args = arguments(got.model, got.shape)
        call(gm, got, graph, args)
        assert bool(args["memory"].slots[0].keys.any()) is not removed_by_fx


def test_unread_inputs_stay_unless_asked() -> None:
    gm = store_and_return()
    eliminate_dead_code(gm.graph)
    assert "unused" in names(gm)
    assert eliminate_dead_code(gm.graph, placeholders=True) == 1
    assert "unused" not in names(gm)


def test_what_is_kept_can_be_chosen() -> None:
    gm = store_and_return()
    assert eliminate_dead_code(gm.graph, keep=lambda n: n.name == "exp", placeholders=True) == 5
    assert names(gm) == ["x", "sin", "exp", "mul", "output"]


def test_the_pass_removes_the_same() -> None:
    gm = store_and_return()
    result = EliminateDeadCode(placeholders=True)(gm)
    assert (result.graph_module, result.changes) == (gm, 3)
    assert names(gm) == ["x", "keys", "narrow", "add", "copy_", "mul", "output"]
    kept = EliminateDeadCode(keep=lambda n: n.name == "mul")(gm)
    assert kept.changes == 3
    assert names(gm) == ["x", "keys", "mul", "output"]


def test_removing_twice_removes_nothing_more() -> None:
    gm = store_and_return()
    eliminate_dead_code(gm.graph, placeholders=True)
    before = names(gm)
    assert eliminate_dead_code(gm.graph, placeholders=True) == 0
    assert names(gm) == before


def test_setitem_and_augmented_assignment_survive() -> None:
    g = Graph("x", "keys")
    x, keys = g.inputs
    g.call(operator.setitem, keys, 0, x)
    g.call(operator.iadd, g.call(operator.getitem, keys, 1), x)
    gm = g.finish(x)
    assert eliminate_dead_code(gm.graph) == 0
    kept: Tensor = torch.zeros(2, 1)
    gm(torch.ones(1), kept)
    assert kept.tolist() == [[1.0], [1.0]]


def test_an_in_place_activation_survives() -> None:
    """``functional.relu(h, inplace=True)`` whose result nobody reads, because ``h`` is read."""
    g = Graph("x")
    h = g.call(torch.neg, g.inputs[0])
    g.call(functional.relu, h, inplace=True)
    gm = g.finish(h)
    eliminate_dead_code(gm.graph)
    gm.recompile()
    assert gm(torch.ones(1))[0].item() == 0.0


def test_a_custom_operator_that_writes_survives(stores: Any) -> None:
    g = Graph("buffer", "value")
    g.call(stores.store.default, *g.inputs)
    gm = g.finish(g.inputs[1])
    assert eliminate_dead_code(gm.graph) == 0
