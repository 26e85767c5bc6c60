"""Probe: what sublayers do to the stream, measured in float32, and nothing else changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from adaskip_passes import Probe, Replacement, Skip, UnsupportedError, fuse, link, run_passes
from adaskip_passes.infra.graph_module import text
from adaskip_passes.partition.outer import piece_of
from adaskip_passes.transforms.probe import PROBE_STATS, VALID, measure_together, probe_piece
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
from tests.support.fx_reference import Instead, eager, moments, same


def probed(got: Cut, *sublayers: int, skipped: tuple[int, ...] = ()) -> fx.GraphModule:
    skips = Skip({i: Replacement("nothing", "scale") for i in skipped})
    return run_passes(got.outer, (skips, Probe(sublayers)))


def run(
    got: Cut, outer: fx.GraphModule, args: Any, valid: Tensor, **factors: float
) -> tuple[Tensor, ...]:
    extra = {VALID: valid, **{k: torch.tensor(v) for k, v in factors.items()}}
    return call(link(outer, got.compiler), got, outer.graph, args, extra)


def all_valid(args: Any) -> Tensor:
    return torch.ones(args["ids"].shape, dtype=torch.bool)


def reference(streams: list[Tensor], valid: Tensor, *sublayers: int) -> npt.NDArray[np.float64]:
    return np.stack([moments(streams[i], streams[i + 1], valid) for i in sublayers])


def close(measured: Tensor, expected: npt.NDArray[np.float64]) -> None:
    assert measured.dtype == torch.float32
    np.testing.assert_allclose(measured.numpy().astype(np.float64), expected, rtol=1e-5, atol=1e-7)


# What is measured ------------------------------------------------------------------------------


@given(st.data())
def test_moments_are_those_of_the_stream(data: st.DataObject) -> None:
    """Any sublayers, any tokens that count, some sublayers skipped; no output changes."""
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    decode = data.draw(st.booleans(), "decode")
    tokens = 1 if decode else data.draw(st.integers(2, 9), "tokens")
    got = shared(shape, 1, 9) if decode else shared(shape)
    everything = range(2 * shape.layers)
    skipped = data.draw(st.sets(st.sampled_from(everything), max_size=2 * shape.layers - 1), "skip")
    left = [i for i in everything if i not in skipped]
    chosen = data.draw(st.sets(st.sampled_from(left), min_size=1), "probed")
    rows = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    counted = st.lists(rows, min_size=shape.batch, max_size=shape.batch)
    valid = torch.tensor(data.draw(counted, "valid"))
    filled = max(2, tokens)
    args = arguments(got.model, shape, tokens, filled, seed=tokens)
    twin = arguments(got.model, shape, tokens, filled, seed=tokens)
    outer = probed(got, *sorted(chosen), skipped=tuple(sorted(skipped)))
    logits, measured = run(got, outer, args, valid, **{f"factor_{i}": 1.25 for i in skipped})
    streams: list[Tensor] = []
    expected = eager(twin, {i: Instead(1.25) for i in skipped}, streams)
    assert torch.equal(logits, expected)
    assert same(args, twin)
    close(measured, reference(streams, valid, *sorted(chosen)))


def test_moments_of_the_wrong_sublayer_differ() -> None:
    got = shared(Shape())
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    streams: list[Tensor] = []
    eager(twin, streams=streams)
    _, measured = run(got, probed(got, 1), args, all_valid(args))
    close(measured, reference(streams, all_valid(args), 1))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        close(measured, reference(streams, all_valid(args), 2))


@pytest.mark.parametrize("block", ["InPlace", "BranchInPlace", "Dropped", "PostNorm", "Multiplied"])
def test_every_way_to_join_a_branch_is_measured(block: str) -> None:
    """Also where the stream is written in place, so that before and after share storage."""
    got = shared(Shape(block=block))
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    streams: list[Tensor] = []
    expected = eager(twin, streams=streams)
    logits, measured = run(got, probed(got, 0, 1, 2, 3), args, all_valid(args))
    assert torch.equal(logits, expected)
    close(measured, reference(streams, all_valid(args), 0, 1, 2, 3))


def test_the_order_of_results_is_the_order_asked_for() -> None:
    got = shared(Shape())
    args = arguments(got.model, got.shape)
    _, one = run(got, probed(got, 2, 0), args, all_valid(args))
    args = arguments(got.model, got.shape)
    _, other = run(got, probed(got, 0, 2), args, all_valid(args))
    assert torch.equal(one, other.flip(0))
    assert one.shape == (2, got.shape.batch, len(PROBE_STATS))


def test_the_names_of_what_is_measured() -> None:
    assert PROBE_STATS == ("cosine", "ratio", "before_squared", "after_squared", "tokens")
    valid = torch.ones(1, 1, dtype=torch.bool)
    piece = probe_piece(torch.zeros(1, 1, 2), valid, [])
    before, after = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[6.0, 8.0]]])
    values = dict(zip(PROBE_STATS, piece.module(before, after, valid)[0].tolist(), strict=True))
    assert values == pytest.approx(
        {
            "cosine": 0.6,
            "ratio": 10 / 3,
            "before_squared": 9.0,
            "after_squared": 100.0,
            "tokens": 1.0,
        }
    )


def test_a_bfloat16_stream_is_measured_in_float32() -> None:
    got = shared(Shape(layers=2, hidden=16, dtype=torch.bfloat16))
    args, twin = (arguments(got.model, got.shape) for _ in range(2))
    streams: list[Tensor] = []
    eager(twin, streams=streams)
    _, measured = run(got, probed(got, 0, 3), args, all_valid(args))
    expected = reference(streams, all_valid(args), 0, 3)
    close(measured, expected)
    narrow = [s.to(torch.bfloat16) for s in streams]
    cosine = torch.cosine_similarity(narrow[0], narrow[1], -1).sum(1)  # computed in bfloat16
    assert not np.allclose(cosine.double().numpy(), expected[0, :, 0], rtol=1e-5)


# What counts -----------------------------------------------------------------------------------


class Feeding(Block):
    """An FFN without attention, so that one token's NaN stays its own."""

    def forward(self, x: Tensor, table: Tensor, slot: Slot, start: int) -> Tensor:
        return x + self.feed(x)


def test_padding_may_hold_nan() -> None:
    shape = Shape(layers=2)
    got = cut(Decoder(shape, Feeding), shape)
    with torch.no_grad():
        got.model.embed.weight[0] = float("nan")
        got.model.embed.weight[1] = float("inf")
    args = arguments(got.model, shape)
    args["ids"][0, 2:4], args["ids"][1, 0] = 0, 1
    args["ids"][0, :2], args["ids"][0, 4:], args["ids"][1, 1:] = 3, 4, 5
    valid = args["ids"] > 1
    outer = probed(got, 0, 1)
    _, measured = run(got, outer, args, valid)
    assert measured.isfinite().all()
    assert measured[..., 4].tolist() == [[5.0, 6.0]] * 2
    _, unmasked = run(got, outer, args, all_valid(args))
    assert torch.equal(unmasked, measured), "what is not finite counts, padding or not"


BAD = (0.0, float("nan"), float("inf"), float("-inf"), 1e30)
"""Values of a stream vector that cannot be measured; 1e30 squared is no float32."""


@given(st.data())
def test_a_vector_without_a_direction_is_left_out(data: st.DataObject) -> None:
    """Zero, NaN or Inf in any token, before or after, in any channel: the others alone count."""
    batch, tokens, hidden = 2, data.draw(st.integers(1, 5), "tokens"), 3
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    streams = torch.randn(2, 2, batch, tokens, hidden, generator=generator)  # [before, after], two
    places = st.tuples(*(st.integers(0, n - 1) for n in streams.shape[:-1]))
    left_out = torch.zeros(2, batch, tokens, dtype=torch.bool)
    for place in data.draw(st.lists(places, max_size=4), "places"):
        value = data.draw(st.sampled_from(BAD), "value")
        channel = slice(None) if value == 0 else data.draw(st.integers(0, hidden - 1), "channel")
        streams[place][channel] = value
        left_out[place[1:]] |= ~streams[place].isfinite().all() | bool(value in (0.0, 1e30))
    valid = torch.rand(batch, tokens, generator=generator) < 0.8
    before, after = streams
    together = measure_together(tuple(before), tuple(after), valid)
    piece = probe_piece(before[0], valid, []).module
    for i in range(2):
        expected = moments(before[i], after[i], valid & ~left_out[i])
        close(piece(before[i], after[i], valid), expected)
        close(together[i], expected)
        given, counted = valid.sum(1), (valid & ~left_out[i]).sum(1)
        assert torch.equal(given - together[i, :, 4], (given - counted).float())


def test_one_zero_vector_decided_all() -> None:
    """The smallest of them: a padding token's embedding of zero beside one token, by hand."""
    before, after = torch.tensor([[[0.0, 0.0], [3.0, 0.0]]]), torch.tensor([[[6.0, 8.0]] * 2])
    valid = torch.ones(1, 2, dtype=torch.bool)
    measured = measure_together((before,), (after,), valid)[0, 0]
    torch.testing.assert_close(measured, torch.tensor([0.6, 10 / 3, 9.0, 100.0, 1.0]))
    nearly = before.clone()
    nearly[0, 0, 0] = 1e-10  # the companion: a vector that has a direction counts, however short
    found = measure_together((nearly,), (after,), valid)[0, 0]
    assert found[4] == 2
    assert found[1] > 1e10


def test_a_row_without_valid_tokens_is_zero() -> None:
    got = shared(Shape())
    args = arguments(got.model, got.shape)
    valid = all_valid(args)
    valid[1] = False
    _, measured = run(got, probed(got, 0), args, valid)
    assert measured[0, 1].tolist() == [0.0] * 5
    assert measured[0, 0, 4] == 7.0


def test_measuring_adds_up_over_tokens() -> None:
    """Moments of two halves are those of the whole: they can be summed over steps."""
    got = shared(Shape())
    outer = probed(got, 0, 1, 2, 3)
    valid = torch.zeros(got.shape.batch, 7, dtype=torch.bool)
    valid[:, ::2] = True
    one, two, both = (
        run(got, outer, arguments(got.model, got.shape), v)[1]
        for v in (valid, ~valid, valid | ~valid)
    )
    np.testing.assert_allclose((one + two).numpy(), both.numpy(), rtol=1e-6)


# The graph -------------------------------------------------------------------------------------


def test_the_outer_graph_with_a_probe() -> None:
    assert text(probed(shared(Shape()), 0, 3)) == (
        "x, table = prologue(+5 inputs)\n"
        "x_1 = layers_0_attention(x, table, +7 inputs)\n"
        "probe_0 = probe(x, x_1, valid, +1 inputs)\n"
        "x_2 = layers_0_ffn(x_1, +6 inputs)\n"
        "x_3 = layers_1_attention(x_2, table, +7 inputs)\n"
        "x_4 = layers_1_ffn(x_3, +6 inputs)\n"
        "probe_3 = probe(x_3, x_4, valid, +1 inputs)\n"
        "epilogue = epilogue(x_4, +3 inputs)\n"
        "stack = stack((probe_0, probe_3))\n"
        "return (epilogue, stack)"
    )


def test_no_probes_change_nothing() -> None:
    got = shared(Shape())
    assert text(run_passes(got.outer, (Probe(()),))) == text(got.outer)
    assert VALID not in [n.name for n in probed(got).graph.find_nodes(op="placeholder")]


def test_probes_read_and_do_not_write() -> None:
    """Linked and fused, with all probes and with none, outputs have the same bits."""
    got = shared(Shape())
    outer = probed(got, 0, 1, 2, 3)
    plain = call(
        link(got.outer, got.compiler), got, got.outer.graph, arguments(got.model, got.shape)
    )
    args = arguments(got.model, got.shape)
    logits, linked = run(got, outer, args, all_valid(args))
    fused = call(
        fuse(outer), got, outer.graph, arguments(got.model, got.shape), {VALID: all_valid(args)}
    )
    assert torch.equal(plain[0], logits)
    assert torch.equal(plain[0], fused[0])
    assert torch.equal(linked, fused[1])


def test_the_probe_is_compiled_once_however_many_there_are() -> None:
    shape = Shape(layers=2)
    got = cut(Decoder(shape), shape)
    link(got.outer, got.compiler)
    without = got.compiler.compiled
    link(probed(got, 2), got.compiler)
    assert got.compiler.compiled == without + 1
    link(probed(got, 0, 1, 2, 3), got.compiler)
    link(probed(got, 3, 1), got.compiler)
    assert got.compiler.compiled == without + 1


def test_a_sublayers_code_does_not_depend_on_its_probe() -> None:
    def keys(outer: fx.GraphModule) -> list[str]:
        found = [piece_of(n) for n in outer.graph.find_nodes(op="call_module")]
        return [p.key for p in found if p is not None and p.role != "probe"]

    got = shared(Shape())
    assert keys(probed(got, 0, 1, 2, 3)) == keys(got.outer)


# Sublayers with more to give, and what is refused ----------------------------------------------


class HandsOn(Decoder):
    """The first attention's branch is read again by both FFNs."""

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        layers: Any = self.layers
        x, table, first = self.embed(ids), self.table(0, ids.shape[1]), None
        for layer, slot in zip(layers, memory.slots, strict=True):
            branch = layer.attend(x, table, slot, 0)
            first = branch if first is None else first
            x = x + branch
            x = x + layer.mlp(layer.norm2(x) * first)
        return self.head(self.norm(x))


def test_a_sublayer_that_hands_on_more_than_the_stream_can_be_measured() -> None:
    shape = Shape()
    got = cut(HandsOn(shape), shape)
    piece = piece_of(got.outer.graph.find_nodes(op="call_module")[1])
    assert piece is not None
    assert piece.outputs == 2
    args = arguments(got.model, shape)
    logits, measured = run(got, probed(got, 0), args, all_valid(args))
    twin = arguments(got.model, shape)
    with torch.no_grad():
        assert torch.equal(logits, got.model(twin["ids"], twin["memory"]))
        x = got.model.embed(twin["ids"])
        table = got.model.table(0, 7)
        fresh = arguments(got.model, shape)["memory"].slots[0]
        after = x + got.model.layers[0].attend(x, table, fresh, 0)  # type: ignore[operator]
    close(measured, reference([x, after], all_valid(args), 0))


def test_a_skipped_sublayer_cannot_be_measured() -> None:
    got = shared(Shape())
    with pytest.raises(
        UnsupportedError, match=r"^sublayers \[1, 3\] do not run in this graph: nothing to measure$"
    ):
        run_passes(got.outer, (Skip({1: Replacement(), 3: Replacement()}), Probe((0, 1, 3))))
    with pytest.raises(UnsupportedError, match=r"sublayers \[7\] do not run"):
        probed(got, 7)


def test_a_measured_sublayer_is_not_skipped_silently() -> None:
    """In this order the probe would compare the stream with itself and report a cosine of 1."""
    with pytest.raises(UnsupportedError):
        run_passes(shared(Shape()).outer, (Probe((1,)), Skip({1: Replacement()})))


def test_a_sublayer_beside_a_measured_one_can_be_skipped_in_any_order() -> None:
    """What is measured then is the stream that the skip leaves."""
    got, skip = shared(Shape()), Skip({1: Replacement("nothing")})
    first, last = (run_passes(got.outer, p) for p in ((skip, Probe((2,))), (Probe((2,)), skip)))
    assert sorted(text(first).splitlines()) == sorted(text(last).splitlines())


def test_two_probe_passes_share_the_mask_or_are_refused() -> None:
    got = shared(Shape())
    args = arguments(got.model, got.shape)
    try:
        outer = run_passes(got.outer, (Probe((0,)), Probe((1,))))
    except UnsupportedError:
        return
    names = [n.name for n in outer.graph.find_nodes(op="placeholder")]
    assert [n for n in names if n.startswith(VALID)] == [VALID]
    _, first, second = run(got, outer, args, all_valid(args))
    _, both = run(got, probed(got, 0, 1), arguments(got.model, got.shape), all_valid(args))
    assert torch.equal(torch.cat((first, second)), both)


# All at the end --------------------------------------------------------------------------------


def probed_together(got: Cut, *sublayers: int) -> fx.GraphModule:
    return run_passes(got.outer, (Probe(sublayers, together=True),))


@given(st.data())
def test_measuring_together_measures_the_same(data: st.DataObject) -> None:
    """As in pieces of their own and as in float64; no output and no cache changes."""
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    tokens = data.draw(st.sampled_from([1, 1, 2, 7]), "tokens")
    got = shared(shape, 1, 9) if tokens == 1 else shared(shape)
    sublayers = st.sampled_from(range(2 * shape.layers))
    chosen = data.draw(st.lists(sublayers, min_size=1, unique=True), "probed")
    rows = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    counted = st.lists(rows, min_size=shape.batch, max_size=shape.batch)
    valid = torch.tensor(data.draw(counted, "valid"))
    args, twin, third = (arguments(got.model, shape, tokens, 9, seed=tokens) for _ in range(3))
    logits, measured = run(got, probed_together(got, *chosen), args, valid)
    expected_logits, expected = run(got, probed(got, *chosen), twin, valid)
    assert torch.equal(logits, expected_logits)
    assert same(args, twin)
    close(measured, expected.double().numpy())
    streams: list[Tensor] = []
    eager(third, streams=streams)
    close(measured, reference(streams, valid, *chosen))


def test_together_the_wrong_sublayer_differs_too() -> None:
    got = shared(Shape(), 1, 9)
    args, twin = (arguments(got.model, got.shape, 1, 9) for _ in range(2))
    _, measured = run(got, probed_together(got, 0, 1), args, all_valid(args))
    _, other = run(got, probed(got, 1, 0), twin, all_valid(twin))
    close(measured, other.flip(0).double().numpy())
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        close(measured, other.double().numpy())


@pytest.mark.parametrize("block", ["InPlace", "BranchInPlace", "Dropped", "PostNorm", "Multiplied"])
def test_together_every_way_to_join_a_branch_is_measured(block: str) -> None:
    """At the end no stream must have been overwritten."""
    got = shared(Shape(block=block), 1, 9)
    args, twin = (arguments(got.model, got.shape, 1, 9) for _ in range(2))
    streams: list[Tensor] = []
    expected = eager(twin, streams=streams)
    logits, measured = run(got, probed_together(got, 0, 1, 2, 3), args, all_valid(args))
    assert torch.equal(logits, expected)
    assert same(args, twin)
    close(measured, reference(streams, all_valid(args), 0, 1, 2, 3))


@pytest.mark.parametrize("tokens", [1, 7])
def test_together_padding_may_hold_nan(tokens: int) -> None:
    shape = Shape(layers=2)
    got = cut(Decoder(shape, Feeding), shape, tokens, 9)
    with torch.no_grad():
        got.model.embed.weight[0] = float("nan")
        got.model.embed.weight[1] = float("inf")
    args = arguments(got.model, shape, tokens, 9)
    args["ids"][0], args["ids"][1] = 0, 3
    if tokens > 1:
        args["ids"][0, 2:], args["ids"][1, 0] = 4, 1
    valid = args["ids"] > 1
    outer = probed_together(got, 0, 1)
    _, measured = run(got, outer, args, valid)
    assert measured.isfinite().all()
    assert measured[..., 4].tolist() == [valid.sum(1).tolist()] * 2
    if tokens == 1:
        assert measured[:, 0].tolist() == [[0.0] * 5] * 2
    _, unmasked = run(got, outer, args, all_valid(args))
    assert torch.equal(unmasked, measured), "what is not finite counts, padding or not"


def test_together_there_is_no_piece_for_it() -> None:
    got = shared(Shape())
    assert text(probed_together(got, 0, 3)) == (
        "x, table = prologue(+5 inputs)\n"
        "x_1 = layers_0_attention(x, table, +7 inputs)\n"
        "x_2 = layers_0_ffn(x_1, +6 inputs)\n"
        "x_3 = layers_1_attention(x_2, table, +7 inputs)\n"
        "x_4 = layers_1_ffn(x_3, +6 inputs)\n"
        "epilogue = epilogue(x_4, +3 inputs)\n"
        "measure_together = measure_together((x, x_3), (x_1, x_4), valid)\n"
        "return (epilogue, measure_together)"
    )
    link(got.outer, got.compiler)
    compiled = got.compiler.compiled
    link(probed_together(got, 0, 1, 2, 3), got.compiler)
    assert got.compiler.compiled == compiled


def test_together_linked_and_fused_are_the_same() -> None:
    got = shared(Shape(), 1, 9)
    outer = probed_together(got, 0, 1, 2, 3)
    args, twin = (arguments(got.model, got.shape, 1, 9) for _ in range(2))
    linked = run(got, outer, args, all_valid(args))
    fused = call(fuse(outer), got, outer.graph, twin, {VALID: all_valid(twin)})
    assert all(torch.equal(a, b) for a, b in zip(linked, fused, strict=True))


def vanishing(before: float, after: float) -> tuple[Tensor, Tensor]:
    """Moments of constant streams, measured together and by a piece."""
    valid, ones = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 4)
    streams = ones * before, ones * after
    (together,) = measure_together(streams[:1], streams[1:], valid)
    return together, probe_piece(ones, valid, []).module(*streams, valid)


@pytest.mark.parametrize("before", [1e-15, 1.0, 1e15])
def test_together_a_stream_that_vanishes_measures_the_same(before: float) -> None:
    together, apart = vanishing(before, 0.0)
    close(together, apart.double().numpy())


def test_together_a_stream_of_zeros_measures_the_same() -> None:
    together, apart = vanishing(0.0, 0.0)
    close(together, apart.double().numpy())


def test_together_refuses_what_it_cannot_measure() -> None:
    got = shared(Shape())
    with pytest.raises(UnsupportedError, match=r"sublayers \[1\] do not run in this graph"):
        run_passes(got.outer, (Skip({1: Replacement()}), Probe((0, 1), together=True)))
    with pytest.raises(UnsupportedError, match=r"sublayers \[7\] do not run"):
        probed_together(got, 7)
    for first, second in ((True, True), (True, False), (False, True)):
        with pytest.raises(UnsupportedError, match="probed already"):
            run_passes(got.outer, (Probe((0,), first), Probe((1,), second)))
    assert text(run_passes(got.outer, (Probe((), together=True),))) == text(got.outer)
