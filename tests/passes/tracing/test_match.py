"""Twins: when two modules trace alike, how they correspond, and what a place may be used for."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaskip_passes.tracing.repeated_layers.match import LayerIndex, layer_index, twins
from tests.support.fx_decoders import Block, Shape

SHAPE = Shape()


class Layer(nn.Module):
    """A module that knows its place, and has something of every kind that modules have."""

    def __init__(self, place: int, width: int = 4) -> None:
        super().__init__()
        self.layer_idx = place
        self.linear = nn.Linear(width, width)
        self.register_buffer("table", torch.rand(3))
        self.plain = torch.rand(2)
        self.activation = torch.tanh
        self.scaled = functools.partial(torch.mul, other=0.5)
        self.sizes: dict[str, Any] = {"heads": [1, 2], "shape": (width, 2), "names": {"a"}}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def pair(change: Callable[[Layer], Any] | None = None) -> Any:
    """How layer 0 corresponds to layer 1, to which something is done."""
    one, other = Layer(0), Layer(1)
    if change is not None:
        change(other)
    return twins(one, other, 0, 1)


def test_every_tensor_has_its_counterpart() -> None:
    one, other = Layer(3), Layer(5)
    found = twins(one, other, 3, 5)
    assert found is not None
    expected = [
        (one.linear.weight, other.linear.weight),
        (one.linear.bias, other.linear.bias),
        (one.get_buffer("table"), other.get_buffer("table")),
        (one.plain, other.plain),
    ]
    assert len(found.tensors) == len(expected)
    assert all(found.tensors[id(a)] == (a, b) for a, b in expected)
    assert [(owner is one, name) for owner, name in found.places] == [(True, "layer_idx")]


def test_several_objects_at_once() -> None:
    shape = Shape()
    blocks = Block(shape), Block(shape)
    slots = torch.zeros(2), torch.zeros(2)
    found = twins((blocks[0], slots[0]), (blocks[1], slots[1]), 0, 1)
    assert found is not None
    assert found.tensors[id(slots[0])] == (slots[0], slots[1])
    assert len(found.tensors) == 1 + len(list(blocks[0].parameters()))


def _share_inside(layer: Layer) -> None:
    layer.plain = layer.get_buffer("table")


DIFFERENT = {
    "a float": lambda m: setattr(m.linear, "eps", 0.5),
    "another attribute": lambda m: setattr(m, "more", None),
    "another value": lambda m: setattr(m, "activation", torch.sigmoid),
    "mode": lambda m: m.eval(),
    "shape": lambda m: setattr(m, "plain", torch.rand(3)),
    "dtype": lambda m: m.double(),
    "stride": lambda m: setattr(m.linear, "weight", nn.Parameter(torch.rand(4, 4).t())),
    "gradient": lambda m: m.requires_grad_(False),
    "class": lambda m: setattr(m, "linear", nn.Bilinear(4, 4, 4)),
    "parameter or not": lambda m: setattr(m, "plain", nn.Parameter(torch.rand(2))),
    "in a list": lambda m: m.sizes["heads"].append(3),
    "in a tuple": lambda m: m.sizes.update(shape=(4, 3)),
    "in a set": lambda m: m.sizes["names"].add("b"),
    "a partial": lambda m: setattr(m, "scaled", functools.partial(torch.mul, other=0.25)),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "its forward": lambda m: setattr(m, "forward", m.linear.forward),
    "one tensor twice": _share_inside,
    "a number that is not its place": lambda m: setattr(m, "layer_idx", 2),
    "the first one's place": lambda m: setattr(m, "layer_idx", 0.0),
    "the place in a list": lambda m: setattr(m, "sizes", {**m.sizes, "heads": [1, 3]}),
    "a tensor's attribute": lambda m: setattr(m.plain, "scale", 2),
}


def test_the_layer_that_they_change_is_a_twin() -> None:
    assert pair() is not None


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_no_twin(change: Callable[[Layer], Any]) -> None:
    assert pair(change) is None


def _around(layer: Layer, factor: float = 2.0) -> None:
    """Put a function around a layer's forward that is made for it, as parallelism does."""
    own, linear = layer.forward, layer.linear

    def forward(x: Tensor) -> Tensor:
        return own(x) * factor + linear(x)

    layer.forward = forward  # type: ignore[method-assign]


def _pair_around(**second: float) -> Any:
    one, other = Layer(0), Layer(1)
    _around(one)
    _around(other, **second)
    return one, other, twins(one, other, 0, 1)


def test_functions_made_for_a_module_correspond_by_what_they_hold() -> None:
    one, other, found = _pair_around()
    assert found is not None
    assert found.tensors[id(one.linear.weight)] == (one.linear.weight, other.linear.weight)
    assert _pair_around(factor=3.0)[2] is None  # the near miss


def test_a_function_that_holds_the_other_module_is_no_counterpart() -> None:
    one, other = Layer(0), Layer(1)
    _around(one)
    own = other.forward
    other.forward = Layer(0).forward  # type: ignore[method-assign]
    _around(other)
    assert twins(one, other, 0, 1) is None
    other.forward = own  # type: ignore[method-assign]
    _around(other)
    assert twins(one, other, 0, 1) is not None


class Slotted:
    """Keeps its state where `vars` does not show it."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Counted(dict[str, int]):
    """The same: a dictionary's entries."""


@pytest.mark.parametrize("kind", [Slotted, lambda n: Counted(n=n), lambda n: iter([n])])
def test_objects_whose_state_is_not_in_sight_are_no_twins(kind: Callable[[int], Any]) -> None:
    assert pair(lambda m: setattr(m, "activation", torch.tanh)) is not None
    one, other = Layer(0), Layer(1)
    one.activation, other.activation = kind(1), kind(1)
    assert twins(one, other, 0, 1) is None


def test_what_both_share_corresponds_to_itself() -> None:
    one, other = Layer(0), Layer(1)
    other.linear = one.linear
    found = twins(one, other, 0, 1)
    assert found is not None
    assert found.tensors[id(one.linear.weight)] == (one.linear.weight, one.linear.weight)


def test_cycles_end() -> None:
    one, other = Layer(0), Layer(1)
    for layer in (one, other):
        layer.sizes["self"] = layer.sizes
    assert twins(one, other, 0, 1) is not None


# A place ----------------------------------------------------------------------------------------

TABLE = [1.0, 2.0, 3.0]
USES: dict[str, Callable[[Any], Any]] = {
    "equal": lambda p: p == 1,
    "different": lambda p: p != 0,
    "less": lambda p: p < 3,
    "plus": lambda p: p + 1,
    "plus, turned round": lambda p: 1 + p,
    "modulo": lambda p: p % 2,
    "divided": lambda p: p / 2,
    "minus itself": operator.neg,
    "true": lambda p: 1 if p else 2,
    "not": lambda p: not p,
    "integer": int,
    "float": float,
    "in a text": lambda p: len(f"layer {p}"),
    "as a text": lambda p: len(str(p)),
    "index": lambda p: TABLE[p],
    "slice": lambda p: len(TABLE[:p]),
    "key": lambda p: {0: 1, 1: 2}[p],
    "key, with a default": lambda p: {0: 1, 1: 2}.get(p, 3),
    "member": lambda p: p in (0, 1),
    "member of a set": lambda p: p in {0, 1},
    "range": lambda p: len(range(p)),
    "smaller": lambda p: min(p, 3),
    "inside a tuple": lambda p: (p,) == (1,),
    "name of an attribute": lambda p: getattr(TABLE, f"_{p}", 2),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_place_cannot_be_used(use: Callable[[Any], Any]) -> None:
    use(1)  # what an integer can
    with pytest.raises(TypeError, match=r"not the same for its twins|Place"):
        use(LayerIndex(1))


class Holder:
    def __init__(self, place: int | LayerIndex) -> None:
        self.place = place


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nor_while_it_is_traced(use: Callable[[Any], Any]) -> None:
    def traced(x: Tensor, holder: Holder) -> Tensor:
        return x * float(use(holder.place))

    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    assert compiled(torch.ones(1), Holder(1)) == float(use(1))
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, TypeError)):
        compiled(torch.ones(1), Holder(LayerIndex(1)))
    torch._dynamo.reset()


def test_whoever_knows_gets_the_number() -> None:
    assert layer_index(LayerIndex(3)) == layer_index(3) == 3


def test_a_place_can_be_handed_on_while_it_is_traced() -> None:
    def traced(x: Tensor, holder: Holder) -> Tensor:
        return x * layer_index(holder.place)

    assert (
        torch.compile(traced, backend="eager", fullgraph=True)(torch.ones(1), Holder(LayerIndex(3)))
        == 3
    )
