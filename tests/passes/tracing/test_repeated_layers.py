"""Repeats: the graph is the same whether every module is traced, or two of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaskip_passes import UnsupportedError, capture
from adaskip_passes.tracing.capture import Capture
from adaskip_passes.tracing.repeated_layers import mark
from adaskip_passes.tracing.repeated_layers.mark import Repeat
from adaskip_passes.tracing.repeated_layers.match import LayerIndex, layer_index
from tests.support.fx_decoders import (
    BLOCKS,
    Block,
    Decoder,
    Memory,
    Shape,
    Slot,
    arguments,
    mark_lengths,
    step,
    trace,
)
from tests.support.fx_reference import eager
from tests.support.graph_text import inputs, lines

SHAPE = Shape(layers=4)


def repeated(args: Mapping[str, Any], *shared: Any) -> Capture:
    """A capture for which one of each kind of layer is traced, if that is possible."""
    memory = args["memory"]
    state = {"L['memory'].slots": memory.slots}
    repeat = Repeat.of("model", args["model"], state, (memory, *shared))
    with torch.no_grad():
        return capture(step, args, lambda captured: captured, repeat)


def both(model: nn.Module, shape: Shape = SHAPE, tokens: int = 7, filled: int = 7) -> Capture:
    """Asserts that the graph is the same with and without; returns the first."""
    args, again = (arguments(model, shape, tokens, filled) for _ in range(2))
    if tokens != filled or tokens > 2:
        mark_lengths(args)
        mark_lengths(again)
    got, full = repeated(args), trace(step, **again)
    assert lines(got) == lines(full)
    assert inputs(got) == inputs(full)
    assert got.python_effects == full.python_effects
    assert (full.copied, full.why_traced) == (0, "")
    return got


# The graph is the same --------------------------------------------------------------------------


def _marked(names: Iterable[str], often: set[str]) -> list[Any]:
    """Names, of which `make test` runs those that come often."""
    return [n if n in often else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("block", _marked(BLOCKS, {"BranchInPlace", "Routed"}))
def test_a_prompt(block: str) -> None:
    shape = replace(SHAPE, block=block)
    got = both(Decoder(shape), shape)
    assert (got.copied, got.why_traced) == (2, "")


def test_a_token() -> None:
    got = both(Decoder(SHAPE), SHAPE, tokens=1, filled=9)
    assert (got.copied, got.why_traced) == (2, "")


class Wider(Block):
    """A block with another FFN."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.mlp.up = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.mlp.down = nn.Linear(3 * shape.hidden, shape.hidden)


class Coarse(Block):
    """A block whose norm has another epsilon."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.norm1.eps = 0.1


@settings(max_examples=settings().max_examples // 5)
@given(st.lists(st.sampled_from([Block, Wider, Coarse]), min_size=1, max_size=6))
def test_two_of_each_kind_are_traced(kinds: list[type[Block]]) -> None:
    shape = replace(SHAPE, layers=len(kinds))
    order = iter(kinds)
    model = Decoder(shape, lambda s: next(order)(s))
    copied = sum(max(0, kinds.count(kind) - 2) for kind in set(kinds))
    assert both(model, shape, 2, 2).copied == copied


def test_the_comparison_sees_a_swapped_weight() -> None:
    """The companion of those above: with layers 1 and 2 exchanged the text is another."""
    shape = SHAPE
    args = arguments(Decoder(shape), shape)
    full = trace(step, **args)
    swap = {"'1'": "'2'", "'2'": "'1'"}
    sources = []
    for source in full.sources:
        head, mark, tail = source.partition("['layers']._modules[")
        sources.append(head + mark + swap.get(tail[:3], tail[:3]) + tail[3:])
    assert lines(replace(full, sources=tuple(sources))) != lines(full)


# What modules may be called with ----------------------------------------------------------------


class SurrogateTensors(Block):
    """Has its place, and hands it to the memory."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.layer_idx = 0

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **_more: Any) -> Tensor:
        return super().forward(x, table, memory.slots[layer_index(self.layer_idx)], start)


class Variant(Decoder):
    """A decoder that calls its layers in a way of its own."""

    def __init__(self, block: type[Block] = SurrogateTensors, shape: Shape = SHAPE) -> None:
        super().__init__(shape, block)
        for place, layer in enumerate(self.layers):
            layer.layer_idx = place

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in self.layers:
            x = layer(x, table, memory, start)
        return x

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        tokens = ids.shape[1]
        start = memory.filled.shape[0] - tokens
        x = self.run(self.embed(ids), self.table(start, tokens), memory, start)
        return self.head(self.norm(x))


def test_a_place_may_say_which_memory() -> None:
    got = both(Variant(), SHAPE)
    assert (got.copied, got.why_traced) == (2, "")


@pytest.mark.slow
def test_arguments_by_name_and_in_containers() -> None:
    class Named(SurrogateTensors):
        def forward(self, x: Tensor, *, both: Any, **more: Any) -> Tensor:
            return super().forward(x, both["tables"][0], more["memory"], both["start"])

    class Caller(Variant):
        def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
            for layer in self.layers:
                both = {"tables": (table, None), "start": start}
                x = layer(x, both=both, memory=memory, unused="text")
            return x

    got = both(Caller(Named), SHAPE)
    assert (got.copied, got.why_traced) == (2, "")


class Unpacks(Variant):
    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in self.layers:
            (x, _) = layer(x, table, memory, start)
        return x


class Sums(Variant):
    """Adds up what layers give besides."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, more = layer(x, table, memory, start)
            total = total + more
        return x + total


class Pair(SurrogateTensors):
    """Returns a tuple, as many layers of transformers do."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Any:
        return super().forward(x, table, memory, start), None


class Besides(SurrogateTensors):
    """Gives something that it computes on the way."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Any:
        inner = self.mlp.up(x).sum(-1, keepdim=True)
        return super().forward(x * inner, table, memory, start), inner


class Turned(SurrogateTensors):
    """Gives the stream last."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Any:
        return x.sum(-1), super().forward(x, table, memory, start)


RESULTS: dict[str, tuple[type[Variant], type[Block]]] = {
    "nothing": (Unpacks, Pair),
    "what nobody reads": (Unpacks, Besides),
    "what is read": (Sums, Besides),
}


@pytest.mark.parametrize("case", _marked(RESULTS, {"what is read"}))
def test_a_tuple_with_more_than_the_stream(case: str) -> None:
    kind, block = RESULTS[case]
    model = kind(block)
    got = both(model)
    assert (got.copied, got.why_traced) == (2, "")
    args, twin = (arguments(model, SHAPE, 5, 5) for _ in range(2))
    with torch.no_grad():
        logits = got.graph(*got.binder(got.sources)(args))[0]
        assert torch.equal(logits, model(twin["ids"], twin["memory"]))


@pytest.mark.slow
def test_a_tensor_for_each_module() -> None:
    class Gated(SurrogateTensors):
        def forward(  # type: ignore[override]
            self, x: Tensor, gate: Tensor, table: Tensor, memory: Memory, start: int
        ) -> Tensor:
            return super().forward(x * gate, table, memory, start)

    class Caller(Variant):
        def __init__(self) -> None:
            super().__init__(Gated)
            self.gates = nn.ParameterList(torch.rand(()) for _ in self.layers)
            self.requires_grad_(False)

        def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
            for layer, gate in zip(self.layers, self.gates, strict=True):
                x = layer(x, gate, table, memory, start)
            return x

    got = both(Caller(), SHAPE)
    assert (got.copied, got.why_traced) == (2, "")


@pytest.mark.slow
def test_a_weight_that_modules_share() -> None:
    model = Decoder(SHAPE)
    layers: Any = model.layers
    for layer in layers:
        layer.mlp.up = layers[0].mlp.up  # one for all
    layers[2].mlp.down.weight = layers[1].mlp.down.weight  # one for two
    got = both(model, SHAPE)
    assert (got.copied, got.why_traced) == (2, "")


def test_a_weight_that_is_the_models_too() -> None:
    """It is one input, whose name is the one by which it was met first."""
    shape = replace(SHAPE, vocab=2 * SHAPE.hidden)
    model = Decoder(shape)
    layers: Any = model.layers
    model.head.weight = layers[2].mlp.up.weight
    args, again = arguments(model, shape), arguments(model, shape)
    got = repeated(args)
    assert got.copied == 2
    assert [s.endswith("['head']._parameters['weight']") for s in got.sources].count(True) == 1
    logits = got.graph(*got.binder(got.sources)(args))[0]
    assert torch.equal(logits, eager(again))


# What is traced in full after all ---------------------------------------------------------------


class UsesPlace(SurrogateTensors):
    """GPT-2's scaling by layer."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        return super().forward(x / (self.layer_idx + 1), table, memory, start)


class BranchesOnPlace(SurrogateTensors):
    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        scale = 2.0 if self.layer_idx % 2 == 0 else 1.0
        return super().forward(x * scale, table, memory, start)


class Halves(SurrogateTensors):
    """Its result is not like its first argument."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        return super().forward(x, table, memory, start)[..., : x.shape[-1]].transpose(0, 1)


class Numbers(SurrogateTensors):
    """Gives a number as well."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Any:
        return super().forward(x, table, memory, start), 0.5


class TakesLast(Variant):
    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in self.layers:
            x = layer(x, table, memory, start)[-1]
        return x


class Backwards(Variant):
    """Calls its last layer first."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x, table, memory, start)[0]
        return x


class Numbered(Variant):
    """Calls each layer with a number of its own."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, table, memory, start, number=number)
        return x


class ByName(Variant):
    """The stream is not the first argument."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in self.layers:
            x = layer(table=table, memory=memory, start=start, x=x)
        return x


class Twice(Variant):
    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in self.layers:
            x = layer(x, table, memory, start)
        return self.layers[0](x, table, memory, start)


class Leaves(Variant):
    """Leaves its last layer out."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x, table, memory, start)
        return x


class Changing(Variant):
    """Layers are called with tables of different shapes."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, table if number < 2 else table.unsqueeze(0), memory, start)
        return x


class Residual(Variant):
    """Each layer is called with the embedding as well, which is the first one's stream."""

    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, table, memory, start, embedding=first)
        return x


class ReadsEmbedding(SurrogateTensors):
    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        return super().forward(x + more["embedding"], table, memory, start)


FULL: dict[str, tuple[type[Variant], type[Block], str]] = {
    "arithmetic with its place": (Variant, UsesPlace, "Observed exception"),
    "a branch on its place": (Variant, BranchesOnPlace, "Observed exception"),
    "a tuple with a number": (Unpacks, Numbers, ""),
    "a tuple, from the last layer on": (Backwards, Pair, ""),
    "a tuple that begins with something else": (
        TakesLast,
        Turned,
        "the module's result is not like",
    ),
    "another result": (Variant, Halves, "the module's result is not like its first argument"),
    "a number for each": (Numbered, SurrogateTensors, "modules are called with 0 and 1"),
    "no first argument": (ByName, SurrogateTensors, ""),
    "called twice": (Twice, SurrogateTensors, "a module is called more than once"),
    "not called": (Leaves, SurrogateTensors, "a module is not called"),
    "other arguments": (Changing, SurrogateTensors, "modules are called with"),
    "one argument in two places": (Residual, ReadsEmbedding, "is given for two arguments"),
}


FULL_OFTEN = {
    *("arithmetic with its place", "called twice", "one argument in two places"),
}


@pytest.mark.parametrize("case", _marked(FULL, FULL_OFTEN))
def test_every_module_is_traced(case: str) -> None:
    model, block, reason = FULL[case]
    got = both(model(block), SHAPE, 2, 2)
    assert got.copied == 0
    assert got.why_traced
    assert reason in got.why_traced


class Remembers(SurrogateTensors):
    """Reads what another layer left behind, past its arguments."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        before = memory.last
        x = super().forward(x, table, memory, start)
        memory.last = x * 2.0
        return x if before is None else x + before


def test_values_that_go_past_the_arguments() -> None:
    args = arguments(Variant(Remembers), SHAPE)
    args["memory"].last = None
    got = repeated(args)
    assert got.why_traced == "L['memory'] is changed"
    assert got.python_effects == ("L['memory']",)


class HandsOn(SurrogateTensors):
    """Leaves its input in a container that it is called with."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        before = more["state"]["last"]
        more["state"]["last"] = x
        return super().forward(x + before, table, memory, start)


class Container(Variant):
    def run(self, x: Tensor, table: Tensor, memory: Memory, start: int) -> Tensor:
        state = {"last": x * 0.5}
        for layer in self.layers:
            x = layer(x, table, memory, start, state=state)
        return x


class FirstSlot(SurrogateTensors):
    """Value residuals: every layer reads what the first one stores."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        return super().forward(x + memory.slots[0].values.mean(), table, memory, start)


class AsksForType(SurrogateTensors):
    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        doubled = x * 2.0 if isinstance(self.layer_idx, int) else x
        return super().forward(doubled, table, memory, start)


class Swallows(SurrogateTensors):
    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        try:
            x = x / (1 + self.layer_idx)
        except TypeError:
            x = x * 3.0
        return super().forward(x, table, memory, start)


COUNT = [0]


class Counts(SurrogateTensors):
    """Reads and changes a global."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        COUNT[0] += 1
        return super().forward(x * float(COUNT[0]), table, memory, start)


HIDDEN: dict[str, tuple[type[Variant], type[Block], str]] = {
    "a container": (Container, HandsOn, "is read outside of the module that computes it"),
    "the first one's state": (Variant, FirstSlot, ""),
    "its place's type": (Variant, AsksForType, "twins were traced differently"),
    "an exception": (Variant, Swallows, "twins were traced differently"),
    "a global": (Variant, Counts, "test_repeated_layers'].COUNT is changed"),
}


@pytest.mark.parametrize("case", _marked(HIDDEN, {"a container", "a global"}))
def test_what_shows_in_the_second_trace(case: str) -> None:
    model, block, reason = HIDDEN[case]
    COUNT[0] = 0
    args, again = arguments(model(block), SHAPE, 2, 2), arguments(model(block), SHAPE, 2, 2)
    got = repeated(args)
    assert got.copied == 0
    assert got.why_traced
    assert reason in got.why_traced
    assert lines(got) == lines(trace(step, **again))


def test_whoever_runs_the_model_meanwhile_runs_the_model() -> None:
    args, again = (arguments(Variant(), SHAPE) for _ in range(2))
    expected = step(**again)[0]  # type: ignore[arg-type]
    state = {"L['memory'].slots": args["memory"].slots}
    repeat = Repeat.of("model", args["model"], state, (args["memory"],))
    assert repeat is not None
    with mark.marked(repeat, repeat.first()):
        assert torch.equal(step(**args)[0], expected)  # type: ignore[arg-type]


class Outside(SurrogateTensors):
    """Reads what the model computed, past its arguments."""

    def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **more: Any) -> Tensor:
        return super().forward(x, memory.table, memory, start)


class Stores(Variant):
    def run(self, x: Tensor, table: Tensor, memory: Any, start: int) -> Tensor:
        memory.table = table
        for layer in self.layers:
            x = layer(x, None, memory, start)
        return x


def test_values_that_come_past_the_arguments() -> None:
    args = arguments(Stores(Outside), SHAPE)
    args["memory"].table = None
    got = repeated(args)
    assert got.why_traced == "L['memory'] is changed"


def test_objects_that_nobody_named() -> None:
    """A module is called with an object that is neither shared nor its own."""
    args = arguments(Variant(), SHAPE)
    repeat = Repeat.of("model", args["model"], {"L['memory'].slots": args["memory"].slots})
    with torch.no_grad():
        got = capture(step, args, lambda captured: captured, repeat)
    assert "proxy" in got.why_traced
    assert lines(got) == lines(trace(step, **args))


@pytest.mark.slow
def test_another_modules_own_object() -> None:
    """Slots in the wrong order: layer 0 is called with the last one."""

    class Backwards(Decoder):
        def forward(self, ids: Tensor, memory: Memory) -> Tensor:
            x, table = self.embed(ids), self.table(0, ids.shape[1])
            for layer, slot in zip(self.layers, memory.slots[::-1], strict=True):
                x = layer(x, table, slot, 0)
            return self.head(self.norm(x))

    assert both(Backwards(SHAPE), SHAPE).why_traced


# Before and after -------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = Variant()
    before = [dict(vars(m)) for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    repeated(arguments(model, SHAPE))
    assert [dict(vars(m)) for m in model.modules()] == before
    assert [type(m) for m in model.modules()] == kinds
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_also_where_it_cannot_be_captured() -> None:
    class Breaks(SurrogateTensors):
        def forward(self, x: Tensor, table: Tensor, memory: Any, start: int, **_: Any) -> Tensor:
            if x.sum() > 0:
                return x
            return super().forward(x, table, memory, start)

    model = Variant(Breaks)
    with pytest.raises(UnsupportedError, match="cannot capture step as one graph"):
        repeated(arguments(model, SHAPE))
    assert {type(layer) for layer in model.layers} == {Breaks}
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_while_it_is_traced_it_is_not() -> None:
    """The companion: the marks are there, and a place in the module that is traced for others."""
    model, memory = Variant(), Memory(SHAPE, 7)
    repeat = Repeat.of("model", model, {"L['memory'].slots": memory.slots}, (memory,))
    assert repeat is not None
    with mark.marked(repeat, repeat.first()):
        assert all(type(layer) is not SurrogateTensors for layer in model.layers)
        places: list[Any] = [layer.layer_idx for layer in model.layers]
        assert [isinstance(p, LayerIndex) for p in places] == [True, False, False, False]


def test_what_build_raises_comes_out_and_is_not_tried_again() -> None:
    args, calls = arguments(Decoder(SHAPE), SHAPE), []
    repeat = Repeat.of("model", args["model"], {"L['memory'].slots": args["memory"].slots})

    def build(got: Capture) -> None:
        calls.append(got)
        raise UnsupportedError("nothing")

    with pytest.raises(UnsupportedError, match=r"^nothing$"), torch.no_grad():
        capture(step, args, build, repeat)
    assert len(calls) == 1


def test_the_list_that_is_as_long_as_the_state() -> None:
    shape = Shape(layers=2, block="Routed")  # its FFNs have a list of two experts each
    model, slots = Decoder(shape), [Slot(shape) for _ in range(2)]
    repeat = Repeat.of("model", model, {"L['memory'].slots": slots})
    assert repeat is not None
    assert repeat.source == "L['model']._modules['layers']"
    assert list(repeat.modules) == list(model.layers)
    assert Repeat.of("model", model, {"L['memory'].slots": slots[:1]}) is None


def test_the_new_inputs_have_storage_of_their_own() -> None:
    """Two inputs that shared one would be taken for each other by a compiler."""
    got = repeated(arguments(Decoder(SHAPE), SHAPE))
    placeholders = got.graph.graph.find_nodes(op="placeholder")
    examples = [n.meta["example_value"] for n in placeholders]
    tensors = [t for t in examples if isinstance(t, Tensor)]
    assert len({t.untyped_storage()._cdata for t in tensors}) == len(tensors)
    assert all(n.target == n.name for n in placeholders if "modules_3" in n.name)
