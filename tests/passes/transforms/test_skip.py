"""Skip: the rewritten graph computes what an eager model does whose sublayers are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional

from adaskip_passes import Replacement, Skip, UnsupportedError, fuse, link, run_passes
from adaskip_passes.infra.graph_module import text
from adaskip_passes.partition.outer import piece_of
from adaskip_passes.transforms.residue import Keep, residue
from tests.support.fx_decoders import (
    ROOM,
    SHAPES,
    Attention,
    Block,
    Cut,
    Decoder,
    Memory,
    Mlp,
    Shape,
    Slot,
    arguments,
    call,
    cut,
    cut_block,
    shared,
    step,
)
from tests.support.fx_reference import Instead, eager, same

KEEPS: tuple[Keep, ...] = get_args(Keep)
FACTORS = st.floats(0.5, 2.0, width=32)


def skip(got: Cut, replacements: Mapping[int, Replacement]) -> fx.GraphModule:
    return run_passes(got.outer, (Skip(replacements),))


def run(got: Cut, outer: fx.GraphModule, args: Any, **factors: float) -> Tensor:
    tensors = {name: torch.tensor(value) for name, value in factors.items()}
    return call(link(outer, got.compiler), got, outer.graph, args, tensors)[0]


def inputs(outer: fx.GraphModule) -> list[str]:
    return [n.name for n in outer.graph.find_nodes(op="placeholder")]


def calls(outer: fx.GraphModule) -> list[str]:
    found = [piece_of(n) for n in outer.graph.find_nodes(op="call_module")]
    return [p.name for p in found if p is not None]


# What it computes ------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, sublayers: int) -> dict[int, tuple[Keep, float | None]]:
    """Any subset, with what is kept and the factor of each."""
    chosen = draw(st.sets(st.integers(0, sublayers - 1)))
    how = st.tuples(st.sampled_from(KEEPS), st.none() | FACTORS)
    return {index: draw(how) for index in sorted(chosen)}


def computes_what_eager_does(
    got: Cut, plan: Mapping[int, tuple[Keep, float | None]], tokens: int, filled: int
) -> None:
    outer = skip(
        got,
        {i: Replacement(k, None if f is None else "scale") for i, (k, f) in plan.items()},
    )
    factors = {f"factor_{i}": f for i, (_, f) in plan.items() if f is not None}
    args = arguments(got.model, got.shape, tokens, filled, seed=filled)
    twin = arguments(got.model, got.shape, tokens, filled, seed=filled)
    result = run(got, outer, args, **factors)
    expected = eager(twin, {i: Instead(f, k) for i, (k, f) in plan.items()})
    assert torch.equal(result, expected)
    assert same(args, twin)


@given(st.data())
def test_any_plan_computes_what_eager_does(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    decode = data.draw(st.booleans(), "decode")
    tokens = 1 if decode else data.draw(st.integers(2, 12), "tokens")
    filled = data.draw(st.integers(max(2, tokens), ROOM - 1), "filled")
    plan = data.draw(plans(2 * shape.layers), "plan")
    got = shared(shape, 1, 9) if decode else shared(shape)
    computes_what_eager_does(got, plan, tokens, filled)


@pytest.mark.parametrize("left", range(4))
def test_all_but_one(left: int) -> None:
    plan = {i: ("nothing", None) for i in range(4) if i != left}
    computes_what_eager_does(shared(Shape()), plan, 6, 6)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_each_alone_with_each_keep(index: int, keep: Keep) -> None:
    computes_what_eager_does(shared(Shape()), {index: (keep, 1.25)}, 6, 6)


@pytest.mark.parametrize("keep", KEEPS)
def test_all_of_them(keep: Keep) -> None:
    plan: dict[int, tuple[Keep, float | None]] = {i: (keep, 0.75) for i in range(4)}
    computes_what_eager_does(shared(Shape()), plan, 6, 6)


@pytest.mark.parametrize("block", ["InPlace", "BranchInPlace"])
@pytest.mark.parametrize("keep", KEEPS)
def test_streams_that_are_written_in_place(block: str, keep: Keep) -> None:
    """The add is an effect of the sublayer that must not be kept with the others."""
    got = shared(Shape(block=block))
    plan: dict[int, tuple[Keep, float | None]] = {0: (keep, None), 3: (keep, 1.5)}
    computes_what_eager_does(got, plan, 6, 6)


def test_no_plan_is_the_captured_model() -> None:
    got = shared(Shape())
    outer = skip(got, {})
    assert text(outer) == text(got.outer)
    assert str(fuse(outer).graph) == str(got.capture.graph.graph)


def test_other_sublayers_and_other_factors_give_other_results() -> None:
    """The comparisons above can fail."""
    got = shared(Shape())
    args = [arguments(got.model, got.shape) for _ in range(4)]
    one = skip(got, {0: Replacement("nothing", "scale")})
    result = run(got, one, args[0], factor_0=1.5)
    assert torch.equal(result, run(got, one, args[1], factor_0=1.5))
    assert not torch.equal(result, run(got, one, args[2], factor_0=1.25))
    assert not torch.equal(result, eager(args[3], {2: Instead(1.5)}))


# The scale -------------------------------------------------------------------------------------


def test_a_bfloat16_stream_is_scaled_in_float32() -> None:
    got = shared(Shape(layers=2, hidden=16, dtype=torch.bfloat16))
    outer = skip(got, {i: Replacement("nothing", "scale") for i in range(4)})
    factor = 1.0 + 3 * 2.0**-9  # between two bfloat16 numbers
    args = arguments(got.model, got.shape)
    result = run(got, outer, args, **{f"factor_{i}": factor for i in range(4)})
    assert result.dtype == torch.bfloat16
    wide = narrow = got.model.embed(args["ids"])
    for _ in range(4):
        wide = (wide.float() * torch.tensor(factor)).to(torch.bfloat16)
        narrow = narrow * torch.tensor(factor).to(torch.bfloat16)
    assert torch.equal(result, got.model.head(got.model.norm(wide)))
    assert not torch.equal(result, got.model.head(got.model.norm(narrow)))


def test_the_piece_that_scales_converts_what_is_not_float32() -> None:
    """On a CPU the result is the same without; other devices round the factor."""

    def methods(shape: Shape) -> list[object]:
        outer = skip(shared(shape), {0: Replacement("nothing", "scale")})
        pieces = [piece_of(n) for n in outer.graph.find_nodes(op="call_module")]
        (scale,) = (p for p in pieces if p is not None and p.role == "surrogate")
        return [n.args[1] for n in scale.module.graph.nodes if n.op == "call_method"]

    wide, narrow = torch.float32, torch.bfloat16
    assert methods(Shape(layers=2, hidden=16, dtype=narrow)) == [wide, narrow]
    assert methods(Shape()) == []


def test_factors_are_inputs_named_after_their_sublayers() -> None:
    """In stream order, whatever the order of the plan."""
    got = shared(Shape(layers=4, hidden=4, heads=1))
    outer = skip(got, {i: Replacement("nothing", "scale") for i in (6, 1, 3)})
    factors = [n for n in inputs(outer) if n.startswith("factor")]
    assert factors == ["factor_1", "factor_3", "factor_6"]
    assert not any(n.startswith("factor") for n in inputs(skip(got, {1: Replacement("nothing")})))
    example = outer.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    assert (example.shape, example.dtype) == (torch.Size([]), torch.float32)


def test_one_piece_serves_all_factors() -> None:
    got = shared(Shape())
    outer = skip(got, {i: Replacement("nothing", "scale") for i in (0, 1, 3)})
    found = [piece_of(n) for n in outer.graph.find_nodes(op="call_module")]
    scales = [p for p in found if p is not None and p.role == "surrogate"]
    assert len(scales) == 3
    assert len({p.key for p in scales}) == 1


# The graph as text -----------------------------------------------------------------------------


def test_the_outer_graph_after_a_skip() -> None:
    outer = skip(shared(Shape()), {0: Replacement("counters", "scale"), 3: Replacement("nothing")})
    assert text(outer) == (
        "x, table = prologue(+5 inputs)\n"
        "layers_0_attention_residue = layers_0_attention_residue(+2 inputs)\n"
        "scale_0 = scale(x, factor_0, +1 inputs)\n"
        "x_2 = layers_0_ffn(scale_0, +6 inputs)\n"
        "x_3 = layers_1_attention(x_2, table, +7 inputs)\n"
        "epilogue = epilogue(x_3, +3 inputs)\n"
        "return (epilogue,)"
    )


def test_the_outer_graph_without_any_sublayer() -> None:
    outer = skip(shared(Shape()), {i: Replacement("nothing") for i in range(4)})
    assert text(outer) == (
        "x = prologue(+5 inputs)\nepilogue = epilogue(x, +3 inputs)\nreturn (epilogue,)"
    )


@given(st.data())
def test_skipping_in_two_steps_is_skipping_at_once(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES[1:4]), "shape")
    got = shared(shape)
    how = st.builds(Replacement, st.sampled_from(KEEPS), st.sampled_from([None, "scale"]))
    plan = data.draw(st.dictionaries(st.integers(0, 2 * shape.layers - 1), how), "plan")
    first = data.draw(st.sets(st.sampled_from(sorted(plan))) if plan else st.just(set()), "first")
    one = {i: r for i, r in plan.items() if i in first}
    two = {i: r for i, r in plan.items() if i not in first}
    steps = run_passes(got.outer, (Skip(one), Skip(two)))
    at_once = skip(got, plan)
    assert text(steps) == text(at_once)
    assert sorted(inputs(steps)) == sorted(inputs(at_once))


def test_skipping_something_else_has_another_text() -> None:
    got = shared(Shape())
    texts = {text(skip(got, {i: Replacement(k)})) for i in range(4) for k in KEEPS}
    assert len(texts) == 3 + 1 + 3 + 1, "an FFN has nothing to keep"


# What is left of a skipped sublayer ------------------------------------------------------------


def left(got: Cut, keep: Keep) -> tuple[bool, bool, bool]:
    """After skipping layer 0's attention: were keys, values, the counter written?"""
    args = arguments(got.model, got.shape)
    run(got, skip(got, {0: Replacement(keep)}), args)
    keys, values, count = args["memory"].slots[0].tensors()
    return bool(keys.any()), bool(values.any()), bool(count.any())


def test_what_each_keep_keeps() -> None:
    got = shared(Shape())
    assert left(got, "nothing") == (False, False, False)
    assert left(got, "counters") == (False, False, True)
    assert left(got, "everything") == (True, True, True)


def test_without_a_skip_all_is_written() -> None:
    got = shared(Shape())
    args = arguments(got.model, got.shape)
    run(got, got.outer, args)
    assert all(bool(t.any()) for t in args["memory"].tensors())


def test_other_layers_write_as_before() -> None:
    got = shared(Shape())
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    run(got, skip(got, {0: Replacement("nothing")}), args)
    eager(twin, {0: Instead()})
    assert same(args, twin)
    assert args["memory"].slots[1].keys.any()


def test_weights_and_slots_of_what_is_skipped_are_no_inputs() -> None:
    got = shared(Shape())
    names = inputs(skip(got, {0: Replacement("nothing"), 1: Replacement("nothing")}))
    assert not any("slots_0" in n or "layers_modules_0" in n for n in names)
    kept = inputs(skip(got, {0: Replacement("counters"), 1: Replacement("counters")}))
    assert {n for n in kept if "slots_0" in n} == {"l_memory_slots_0_count"}
    assert not any("layers_modules_0" in n for n in kept)
    assert {n for n in inputs(got.outer) if "slots_0" in n} > {"l_memory_slots_0_count"}


def test_an_ffn_leaves_no_residue() -> None:
    got = shared(Shape())
    for keep in KEEPS:
        assert "layers_0_ffn_residue" not in calls(skip(got, {1: Replacement(keep)}))
    assert "layers_0_attention_residue" in calls(skip(got, {0: Replacement("everything")}))


def test_a_residue_keeps_its_writes_and_nothing_else() -> None:
    got = shared(Shape())
    piece = piece_of(got.outer.graph.find_nodes(op="call_module")[1])
    assert piece is not None
    whole = residue(piece.module, "everything")
    counters = residue(piece.module, "counters")
    assert whole is not None
    assert counters is not None
    targets = [n.target for n in whole.graph.nodes if n.op == "call_method"]
    assert [t for t in targets if str(t).endswith("_")] == ["index_copy_", "index_copy_", "add_"]
    assert not any("attention" in n.name for n in whole.graph.nodes)
    assert [n.target for n in counters.graph.nodes if n.op == "call_method"] == ["add_"]


class UnreadCounter(Attention):
    """Stores at a place that it is told, and counts without reading the count."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        q, k, v = self.project(x, table)
        slot.keys.narrow(2, start, x.shape[1]).copy_(k)
        slot.values.narrow(2, start, x.shape[1]).copy_(v)
        slot.count.add_(x.shape[1])
        return self.out(self.mix(q, k, v, slot, start).transpose(1, 2).reshape(x.shape))


class Unread(Block):
    attention = UnreadCounter


def test_a_counter_that_its_own_attention_does_not_read() -> None:
    """It belongs to the sublayer all the same: no storage means no counter either."""
    got = cut_block(Unread)
    assert left(got, "everything") == (True, True, True)
    assert left(got, "counters") == (False, False, True)
    assert left(got, "nothing") == (False, False, False)


class PartialRotary(Attention):
    """Half of each key is rotated, in place, before it is stored."""

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, table)
        k[..., :2] = k[..., :2] * table[..., :2]
        v.mul_(2.0)
        return q, k, v


class Partial(Block):
    attention = PartialRotary


def test_keys_that_were_changed_in_place_before_they_are_stored() -> None:
    """Writes to values on their way to the cache are needed as much as the write to it."""
    got = cut_block(Partial)
    computes_what_eager_does(got, {}, 6, 6)
    computes_what_eager_does(got, {0: ("everything", None)}, 6, 6)


class InPlaceMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h[..., :2] = 0.0
        return self.down(functional.relu(h, inplace=True))


class QueriesInPlace(Attention):
    """Queries are changed in place; nothing that is stored depends on them."""

    def project(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, table)
        q[..., :2] = q[..., :2] * 2.0
        return q, k, v


class Tidy(Block):
    attention, ffn = QueriesInPlace, InPlaceMlp


def test_values_changed_in_place_that_no_effect_needs_are_dropped() -> None:
    """An FFN has nothing to keep, and a counter needs no projection."""
    got = cut_block(Tidy)
    plan: dict[int, tuple[Keep, float | None]] = {0: ("counters", None), 1: ("everything", None)}
    computes_what_eager_does(got, {}, 6, 6)
    computes_what_eager_does(got, plan, 6, 6)
    kept = calls(skip(got, {i: Replacement(k) for i, (k, _) in plan.items()}))
    assert "layers_0_ffn_residue" not in kept
    names = inputs(skip(got, {0: Replacement("counters")}))
    assert {n for n in names if "layers_modules_0_modules_self_attn" in n} == set()


# What is refused -------------------------------------------------------------------------------


def test_what_is_not_there_cannot_be_skipped() -> None:
    got = shared(Shape())
    with pytest.raises(
        UnsupportedError, match=r"^sublayer 4 is not in the graph: it has \[0, 1, 2, 3\]$"
    ):
        skip(got, {4: Replacement()})
    with pytest.raises(
        UnsupportedError, match=r"^sublayer 1 is not in the graph: it has \[0, 2, 3\]$"
    ):
        run_passes(got.outer, (Skip({1: Replacement()}), Skip({1: Replacement()})))
    with pytest.raises(UnsupportedError, match=r"^sublayer 0 is not in the graph: it has none$"):
        run_passes(
            got.outer, (Skip({i: Replacement() for i in range(4)}), Skip({0: Replacement()}))
        )
    with pytest.raises(UnsupportedError, match="sublayer -1 is not in the graph"):
        skip(got, {-1: Replacement()})


class SharesKeys(Decoder):
    """Attention reads the keys that the layer `first` computed, and those before it their own."""

    first = 1

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        layers: Any = self.layers
        x, table, keys = self.embed(ids), self.table(0, ids.shape[1]), None
        for number, (layer, slot) in enumerate(zip(layers, memory.slots, strict=True)):
            q, k, v = layer.self_attn.project(layer.norm1(x), table)
            keys = k if number <= self.first else keys
            layer.self_attn.store(slot, keys, v)
            mixed = layer.self_attn.mix(q, keys, v, slot, 0)
            x = x + layer.self_attn.out(mixed.transpose(1, 2).reshape(x.shape))
            x = x + layer.feed(x)
        return self.head(self.norm(x))


def test_a_sublayer_whose_values_are_read_later_cannot_be_skipped() -> None:
    shape = Shape(layers=3)
    got = cut(SharesKeys(shape), shape)
    with pytest.raises(UnsupportedError) as caught:
        skip(got, {2: Replacement("everything")})
    assert str(caught.value) == (
        "layer 1's attention hands 1 value(s) besides the residual stream to later layers, so it "
        "cannot be skipped."
    )
    assert "layers_2_attention" not in calls(skip(got, {4: Replacement("nothing")}))


class SharesFirstKeys(SharesKeys):
    first = 0


def test_values_of_the_embedding_that_later_layers_read_are_the_prologues() -> None:
    """The first layer's keys are made of the embedding alone: it can be skipped all the same."""
    shape = Shape(layers=3)
    got = cut(SharesFirstKeys(shape), shape)
    changed = skip(got, {0: Replacement("nothing")})
    assert "layers_0_attention" not in calls(changed)
    args, expected = arguments(got.model, shape), arguments(got.model, shape)
    logits = call(link(changed, got.compiler), got, changed.graph, args)[0]
    layers: Any = got.model.layers
    with torch.no_grad():
        layers[0].self_attn.out.weight.zero_()
        (wanted,) = step(**expected)
    torch.testing.assert_close(logits, wanted)


def test_a_refused_skip_leaves_the_graph_as_it_was() -> None:
    got = shared(Shape())
    before = text(got.outer)
    with pytest.raises(UnsupportedError):
        skip(got, {0: Replacement(), 9: Replacement()})
    assert text(got.outer) == before
    skip(got, {0: Replacement("counters", "scale")})
    assert text(got.outer) == before
    assert inputs(got.outer) == [
        n.name for n in got.capture.graph.graph.find_nodes(op="placeholder")
    ]
