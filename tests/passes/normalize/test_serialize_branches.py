"""Parallel branches: each becomes a sublayer of its own, and the sum stays what it was."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adaskip_passes import (
    Probe,
    Replacement,
    Skip,
    UnsupportedError,
    find_sublayers,
    link,
    run_passes,
)
from adaskip_passes.infra.graph_module import text
from adaskip_passes.normalize.serialize_branches import SerializeBranches, ordered_after
from adaskip_passes.partition.outer import piece_of
from adaskip_passes.transforms.probe import PROBE_STATS, VALID
from tests.support.fx_decoders import (
    SHAPES,
    Attention,
    Block,
    Cut,
    Decoder,
    Falcon,
    Mlp,
    NeoX,
    Shape,
    Slot,
    arguments,
    call,
    cut_block,
    mark_lengths,
    step,
    trace,
)
from tests.support.fx_reference import moments


class SharedNorm(Block):
    """GPT-J, Phi, Cohere: one norm for both branches; the stream comes first."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        norm = self.norm1(x)
        return x + self.self_attn(norm, table, slot, start) + self.mlp(norm)


class WideNorm(nn.Module):
    """As Cohere's: the weight is cast whenever it is called."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape.hidden) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.to(torch.float64) * x.to(torch.float64).tanh()).to(x.dtype)


class CastsWeight(SharedNorm):
    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.norm1 = WideNorm(shape)  # type: ignore[assignment]


class FeedsFirst(Block):
    """The FFN is computed and added before attention."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return (x + self.feed(x)) + self.attend(x, table, slot, start)


class TwoExperts(nn.Module):
    """DeepSeek-V3: routed and shared experts are two terms of one branch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.routed, self.shared_expert = Mlp(shape), Mlp(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared_expert(x)


class Experts(NeoX):
    ffn = TwoExperts


PARALLEL = {b.__name__: b for b in (NeoX, SharedNorm, CastsWeight, Falcon, FeedsFirst, Experts)}


@functools.cache
def parallel(block: str, layers: int = 3) -> Cut:
    return cut_block(PARALLEL[block], layers)


@torch.no_grad()
def reference(
    args: Mapping[str, Any], factors: Mapping[int, float], streams: list[Tensor] | None = None
) -> Tensor:
    """Logits of a decoder of parallel blocks: attention, then FFN, both read what came before."""
    model, memory, tokens = args["model"], args["memory"], args["ids"].shape[1]
    start = memory.filled.shape[0] - tokens
    x, table = model.embed(args["ids"]), model.table(start, tokens)
    for number, (layer, slot) in enumerate(zip(model.layers, memory.slots, strict=True)):
        norms = (layer.norm1, layer.norm1 if isinstance(layer, SharedNorm) else layer.norm2)
        before = x
        for index in (2 * number, 2 * number + 1):
            if streams is not None:
                streams.append(x)
            if index in factors:
                x = x * factors[index]
            elif index % 2 == 0:
                x = x + layer.self_attn(norms[0](before), table, slot, start)
            else:
                x = x + layer.mlp(norms[1](before))
    if streams is not None:
        streams.append(x)
    return model.head(model.norm(x))


def check(block: str, tokens: int, filled: int, factors: Mapping[int, float]) -> None:
    got = parallel(block) if tokens > 1 else cut_block(PARALLEL[block], 3, batch=1)
    replaced = Skip({i: Replacement("nothing", "scale") for i in factors})
    outer = run_passes(got.outer, (replaced,))
    args, again = (arguments(got.model, got.shape, tokens, filled) for _ in range(2))
    tensors = {f"factor_{i}": torch.tensor(f) for i, f in factors.items()}
    logits = call(link(outer, got.compiler), got, outer.graph, args, tensors)[0]
    torch.testing.assert_close(logits, reference(again, factors), rtol=2e-5, atol=2e-5)
    for number, (mine, theirs) in enumerate(
        zip(args["memory"].slots, again["memory"].slots, strict=True)
    ):
        for a, b in zip(mine.tensors()[:2], theirs.tensors()[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert (2 * number in factors) == bool((mine.keys == 0).all())


@pytest.mark.parametrize("block", PARALLEL)
def test_nothing_skipped(block: str) -> None:
    check(block, 7, 7, {})


def test_each_branch_casts_a_weight_itself() -> None:
    """The prologue would do it for all layers, in a kernel each."""
    calls = parallel("CastsWeight").outer.graph.find_nodes(op="call_module")
    pieces = {piece.name: piece.module.graph for piece in map(piece_of, calls) if piece is not None}

    def casts(name: str) -> int:
        weights = [n for n in pieces[name].find_nodes(op="placeholder") if "norm1" in n.name]
        assert len(weights) == (name != "prologue")
        return sum(user.target == "to" for weight in weights for user in weight.users)

    assert [casts(name) for name in ("prologue", "layers_1_attention", "layers_1_ffn")] == [0, 1, 1]


@given(
    st.sampled_from(sorted(PARALLEL)),
    st.integers(2, 9),
    st.dictionaries(st.integers(0, 5), st.floats(0.5, 2.0, width=32)),
)
def test_any_plan(block: str, tokens: int, factors: dict[int, float]) -> None:
    check(block, tokens, tokens, factors)


def test_the_reference_reads_the_stream_before_both() -> None:
    """The companion: branches one after the other are another function."""
    got = parallel("NeoX")
    args = arguments(got.model, got.shape)
    expected = reference(args, {})
    for layer in got.model.layers:
        layer.forward = functools.partial(Block.forward, layer)  # type: ignore[method-assign]
    try:
        other = step(**arguments(got.model, got.shape))[0]  # type: ignore[arg-type]
    finally:
        for layer in got.model.layers:
            del layer.forward
    assert not torch.allclose(other, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", PARALLEL)
def test_what_is_found(block: str) -> None:
    got = parallel(block)
    assert [(s.layer, s.kind) for s in got.sublayers] == [
        (i, kind) for i in range(3) for kind in ("attention", "ffn")
    ]
    paths = {"attention": "layers.1.self_attn", "ffn": "layers.1.mlp"}
    assert {s.kind: s.path for s in got.sublayers if s.layer == 1} == paths


def test_the_outer_graph() -> None:
    got = parallel("SharedNorm", layers=2)
    assert text(got.outer) == (
        "x, table = prologue(+5 inputs)\n"
        "x_1 = layers_0_attention(x, table, +7 inputs)\n"
        "x_2 = layers_0_ffn(x_1, x, +6 inputs)\n"
        "x_3 = layers_1_attention(x_2, table, +7 inputs)\n"
        "x_4 = layers_1_ffn(x_3, x_2, +6 inputs)\n"
        "epilogue = epilogue(x_4, +3 inputs)\n"
        "return (epilogue,)"
    )


@pytest.mark.parametrize("block", PARALLEL)
def test_equal_layers_are_one_piece_and_nothing_says_earlier(block: str) -> None:
    pieces = [p for n in parallel(block).outer.graph.nodes if (p := piece_of(n))]
    assert len({p.key for p in pieces}) == 4
    assert all(n.target is not ordered_after for p in pieces for n in p.module.graph.nodes)
    assert all(p.outputs == 1 for p in pieces if p.role == "sublayer")


def test_probes_see_the_stream_before_and_after_each_branch() -> None:
    got = parallel("SharedNorm")
    outer = run_passes(got.outer, (Probe((0, 1, 2, 3, 4, 5)),))
    args, again = (arguments(got.model, got.shape) for _ in range(2))
    valid = torch.ones(got.shape.batch, 7, dtype=torch.bool)
    found = call(link(outer, got.compiler), got, outer.graph, args, {VALID: valid})[-1]
    streams: list[Tensor] = []
    reference(again, {}, streams)
    assert found.shape[-1] == len(PROBE_STATS)
    for index in range(6):
        expected = moments(streams[index], streams[index + 1], valid)
        torch.testing.assert_close(
            found[index].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.block}-{s.layers}")
def test_what_is_not_parallel_is_left_alone(shape: Shape) -> None:
    module = trace(step, **arguments(Decoder(shape), shape)).graph
    graph = module.graph
    before = str(graph)
    assert SerializeBranches()(module).changes == 0
    assert str(graph) == before


def test_how_many_there_were() -> None:
    shape = Shape(layers=3)
    module = trace(step, **arguments(Decoder(shape, NeoX), shape)).graph
    graph = module.graph
    assert SerializeBranches()(module).changes == 3
    graph.lint()
    assert SerializeBranches()(module).changes == 0


class Counting(Mlp):
    """An FFN with a state, as attention has one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("seen", torch.zeros(shape.hidden))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("seen").add_(x.sum((0, 1)))
        return super().forward(x)


class BothAct(NeoX):
    ffn = Counting


class KeepsOld(Block):
    """Overwrites the stream and reads it by its old name afterwards."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        old = x
        x += self.attend(x, table, slot, start) + self.feed(x)
        return x + 0.0 * old


def test_what_cannot_be_separated_is_left_and_refused() -> None:
    shape = Shape(layers=2)
    module = trace(step, **arguments(Decoder(shape, KeepsOld), shape)).graph
    graph = module.graph
    before = str(graph)
    assert SerializeBranches()(module).changes == 0
    assert str(graph) == before
    with pytest.raises(UnsupportedError):
        find_sublayers(graph)


def test_an_ffn_with_a_state_is_separated_and_refused() -> None:
    """Its effect moves with it; but what writes is no FFN."""
    shape = Shape(layers=2)
    module = trace(step, **arguments(Decoder(shape, BothAct), shape)).graph
    graph = module.graph
    assert SerializeBranches()(module).changes == 2
    with pytest.raises(UnsupportedError, match="its name says ffn, but it writes to a cache"):
        find_sublayers(graph)


class ReadsCount(NeoX):
    """The FFN reads, before attention, what attention writes."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        fed = self.mlp(self.norm2(x) * slot.count.to(x.dtype))
        return fed + self.attend(x, table, slot, start) + x


class Casts(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).to(x.dtype)


class OwnAutocast(NeoX):
    ffn = Casts


class CastsNorm(Block):
    """The region begins before anything in the branch that reads the stream."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fed = self.mlp(self.norm2(x))
        return fed.to(x.dtype) + self.attend(x, table, slot, start) + x


class CastsAll(Block):
    """A region around all of it is left neither before nor after."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.feed(x).to(x.dtype) + self.attend(x, table, slot, start).to(x.dtype) + x


@pytest.mark.parametrize("block", [ReadsCount, OwnAutocast, CastsNorm])
def test_what_would_be_another_value_is_not_moved(block: type[Block]) -> None:
    shape = Shape(layers=2)
    assert (
        SerializeBranches()(trace(step, **arguments(Decoder(shape, block), shape)).graph).changes
        == 0
    )


def test_what_those_are_near_to() -> None:
    shape = Shape(layers=2)
    module = trace(step, **arguments(Decoder(shape, CastsAll), shape)).graph
    graph = module.graph
    assert SerializeBranches()(module).changes == 2
    graph.lint()


class HalfMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


class HalfAttention(Attention):
    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return super().forward(x, table, slot, start).bfloat16()


class HalfBranches(NeoX):
    """As under autocast: branches are added to each other in half precision, the stream is not."""

    attention, ffn = HalfAttention, HalfMlp


class HalfStream(Block):
    """The other way round: a sum in full precision would be rounded in between."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        half = x.bfloat16()
        full = half.float()
        half += self.feed(full) + self.attend(full, table, slot, start)
        return half.float()


class HalfExperts(TwoExperts):
    def __init__(self, shape: Shape) -> None:
        nn.Module.__init__(self)
        self.routed, self.shared_expert = HalfMlp(shape), HalfMlp(shape)


class HalfTerms(Block):
    """The terms of one branch are added in half precision, as they were."""

    attention, ffn = HalfAttention, HalfExperts

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        n = self.norm2(x)
        return x + (
            self.attend(x, table, slot, start) + self.mlp.routed(n) + self.mlp.shared_expert(n)
        )


def test_what_is_said_of_a_sum_in_half_precision_is_so() -> None:
    shape = Shape(layers=1)
    module = trace(step, **arguments(Decoder(shape, HalfTerms), shape)).graph
    graph = module.graph
    assert SerializeBranches()(module).changes == 1
    for node in graph.find_nodes(op="call_function", target=operator.add):
        terms = [n.meta["example_value"] for n in node.all_input_nodes]
        if all(isinstance(t, Tensor) for t in terms):
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in terms))
            assert node.meta["example_value"].dtype == dtype


@pytest.mark.parametrize(("block", "count"), [(HalfBranches, 1), (HalfStream, 0)])
def test_a_sum_may_become_finer_but_not_coarser(block: type[Block], count: int) -> None:
    shape = Shape(layers=1)
    assert (
        SerializeBranches()(trace(step, **arguments(Decoder(shape, block), shape)).graph).changes
        == count
    )


class CastsBetween(NeoX):
    """A region between the stream and the sum that has nothing of either branch in it."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        n = self.norm1(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            table = (table @ torch.eye(table.shape[-1])).to(x.dtype)
        return x + (self.self_attn(n, table, slot, start) + self.feed(x))


def test_a_region_of_something_else_does_not_matter() -> None:
    shape = Shape(layers=2)
    module = trace(step, **arguments(Decoder(shape, CastsBetween), shape)).graph
    graph = module.graph
    assert SerializeBranches()(module).changes == 2
    graph.lint()


class Relu(Mlp):
    """An activation in place is no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.up(x), inplace=True))


class InPlaceActivation(NeoX):
    ffn = Relu


class Inner(Mlp):
    """An FFN that is a sum of branches itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(x)[..., : x.shape[-1]] + self.down(self.up(x))


class Nested(NeoX):
    ffn = Inner


class Doubles(NeoX):
    """Adds a value to itself, and lengths to each other."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        length = x.shape[1] + x.shape[1] + x.shape[1]
        x = super().forward(x, table, slot, start)
        half = self.norm1(x) * (1.0 / length)
        return x + (half + half)


@pytest.mark.parametrize("block", [InPlaceActivation, Nested])
def test_branches_of_other_forms(block: type[NeoX]) -> None:
    got = cut_block(block, 2)
    args, again = (arguments(got.model, got.shape) for _ in range(2))
    logits = call(link(got.outer, got.compiler), got, got.outer.graph, args)[0]
    torch.testing.assert_close(logits, reference(again, {}), rtol=2e-5, atol=2e-5)


def test_sums_of_one_value_and_of_lengths() -> None:
    shape = Shape(layers=2)
    args = arguments(Decoder(shape, Doubles), shape)
    mark_lengths(args)
    captured = trace(step, **args)
    assert SerializeBranches()(captured.graph).changes == 2
    captured.graph.graph.lint()


class Trains(Block):
    """A dropout that is not idle is no part of a sum."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        both = self.attend(x, table, slot, start) + self.feed(x)
        return x + functional.dropout(both, 0.1, True)


def test_a_dropout_at_work_is_not_taken_apart() -> None:
    shape = Shape(layers=2)
    assert (
        SerializeBranches()(trace(step, **arguments(Decoder(shape, Trains), shape)).graph).changes
        == 0
    )


class Silent(Attention):
    """Attention without a cache: no branch has effects."""

    def store(self, slot: Slot, k: Tensor, v: Tensor) -> None:
        return


class NoEffects(NeoX):
    attention = Silent


def test_without_effects_the_order_is_that_of_the_program() -> None:
    got = cut_block(NoEffects, 2)
    assert [s.kind for s in got.sublayers] == ["attention", "ffn"] * 2
