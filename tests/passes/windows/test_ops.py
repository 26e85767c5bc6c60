"""Attention through windows, against scores that are masked one by one in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from adaskip_passes.decode.ops import EVERY, Bounds
from adaskip_passes.windows import plain_attention
from adaskip_passes.windows.blocks import by_window, heads_of
from adaskip_passes.windows.bounds import narrowed
from adaskip_passes.windows.ops import (
    attend_masked_windowed,
    attend_packed_windowed,
    attend_windowed,
)

HEADS, GROUP, DIM = 3, 2, 8


def inputs(batch: int, tokens: int, stored: int, seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((HEADS * GROUP, tokens), (HEADS, stored), (HEADS, stored))
    return tuple(torch.randn(batch, h, n, DIM, generator=draw) for h, n in shapes)


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: Any,
    lets: Any,
    softcap: float = 0.0,
    sinks_of: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lets(row, t, j)`: whether the model's own mask shows key j to query t."""
    batch, heads, tokens, _ = query.shape
    output = torch.zeros(batch, tokens, heads, DIM, dtype=torch.float64)
    for row in range(batch):
        seen = [[j for j in range(key.shape[2]) if lets(row, t, j)] for t in range(tokens)]
        first = min((js[0] for js in seen if js), default=0)
        for head in range(heads):
            sinks, last = windows[head // GROUP]
            for t, js in enumerate(seen):
                near = [j for j in js if j > js[-1] - last or j - first < sinks]
                if near:
                    scores = key[row, head // GROUP, near].double() @ query[row, head, t].double()
                    scores = scores * 0.3
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    weights = scores.exp()
                    more = 0.0 if sinks_of is None else sinks_of[head].double().exp()
                    shares = weights / (weights.sum() + more)
                    output[row, t, head] = shares @ value[row, head // GROUP, near].double()
    return output


WINDOWS = st.lists(
    st.tuples(st.integers(0, 6), st.one_of(st.integers(1, 30), st.just(EVERY))),
    min_size=HEADS,
    max_size=HEADS,
)


def table(windows: Any) -> torch.Tensor:
    return torch.tensor(windows, dtype=torch.int64)


@given(WINDOWS, st.integers(1, 2), st.integers(1, 20), st.integers(0, 20), st.integers(0, 99))
def test_the_last_queries(windows: Any, batch: int, tokens: int, past: int, seed: int) -> None:
    q, k, v = inputs(batch, tokens, past + tokens, seed)
    got = attend_windowed(q, k, v, table(windows), EVERY, 0.3)
    want = by_hand(q, k, v, windows, lambda row, t, j: j <= past + t)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
@given(WINDOWS, st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_soft_caps_and_sinks(
    softcap: float, with_sinks: bool, windows: Any, tokens: int, past: int, seed: int
) -> None:
    """Of a prompt, of packed texts, of rows with masks, and as training runs them."""
    q, k, v = inputs(1, tokens, past + tokens, seed)
    sinks = torch.linspace(-2, 2, HEADS * GROUP) if with_sinks else None
    more = softcap, sinks

    def causal(row: int, t: int, j: int) -> bool:
        return j <= past + t

    want = by_hand(q, k, v, windows, causal, *more)
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)[None, None]
    for got in (
        attend_windowed(q, k, v, table(windows), EVERY, 0.3, *more),
        attend_masked_windowed(q, k, v, mask, table(windows), 0.3, *more),
        plain_attention.windowed(q, k, v, table(windows), EVERY, 0.3, *more),
        plain_attention.masked_windowed(q, k, v, mask, table(windows), 0.3, *more),
    ):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    if not past:
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        got = attend_packed_windowed(q, k, v, ends, table(windows), EVERY, 0.3, *more)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    full = by_hand(q, k, v, [(0, EVERY)] * HEADS, causal, *more)
    for got in (
        attend_windowed(q, k, v, None, EVERY, 0.3, *more),
        attend_masked_windowed(q, k, v, mask, None, 0.3, *more),
    ):
        torch.testing.assert_close(got.double(), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.one_of(st.integers(1, 30), st.just(EVERY)),
    st.sampled_from([0.0, 0.7]),
    st.booleans(),
    st.integers(0, 99),
)
def test_one_query(
    dtype: torch.dtype,
    batch: int,
    stored: int,
    own: int,
    softcap: float,
    with_sinks: bool,
    seed: int,
) -> None:
    """Of a decode step, whose keys are part of longer buffers, token by token."""
    q, k, v = (t.to(dtype) for t in inputs(batch, 1, stored, seed))
    k, v = (torch.cat((t, t), 2).permute(2, 0, 1, 3).contiguous() for t in (k, v))
    k, v = (t.permute(1, 2, 0, 3)[:, :, :stored] for t in (k, v))
    sinks = torch.linspace(-2, 2, HEADS * GROUP) if with_sinks else None
    got = attend_windowed(q, k, v, None, own, 0.3, softcap, sinks)
    windows = [(0, own)] * HEADS
    want = by_hand(q, k, v, windows, lambda row, t, j: True, softcap, sinks)
    assert got.is_contiguous()
    assert got.dtype == dtype
    off = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), want, atol=off, rtol=off)


def test_another_soft_cap_or_sink_is_noticed() -> None:
    q, k, v = inputs(1, 9, 9, 0)
    sinks = torch.linspace(-2, 2, HEADS * GROUP)
    last = q[:, :, 8:]
    right, of_one = (attend_windowed(t, k, v, None, EVERY, 0.3, 0.7, sinks) for t in (q, last))
    for softcap, scores in ((0.75, sinks), (0.7, sinks.flip(0)), (0.7, None)):
        other = by_hand(q, k, v, [(0, EVERY)] * HEADS, lambda row, t, j: j <= t, softcap, scores)
        for got, want in ((right, other), (of_one, other[:, 8:])):
            with pytest.raises(AssertionError, match="not close"):
                torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_more_queries_than_one_block_has() -> None:
    q, k, v = inputs(1, 300, 310, 0)
    for windows in ([(4, 30), (0, 1), (0, EVERY)], [(2, 200)] * HEADS):
        got = attend_windowed(q, k, v, table(windows), EVERY, 0.3)
        want = by_hand(q, k, v, windows, lambda row, t, j: j <= 10 + t)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    wrong = by_hand(q, k, v, [(2, 201)] * HEADS, lambda row, t, j: j <= 10 + t)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(got.double(), wrong, atol=1e-5, rtol=1e-5)


class Gathered(TorchDispatchMode):
    """Counts the numbers that heads are gathered of."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default):
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_heads_between_others_are_read_where_they_are() -> None:
    """What a window does not show may have no memory behind it: to gather heads reads it."""
    query, key, value = inputs(1, 2, 500, 0)
    windows = table([(2, 9), (0, EVERY), (2, 9)])
    with Gathered() as gathered:
        by_window(query, key, value, windows, EVERY, 0.3, 0.0, None)
    assert not gathered.numbers
    with Gathered() as gathered:  # the companion: as where a mask says what is seen
        heads_of(query, key, value, [0, 2])
    assert gathered.numbers >= 2 * key.numel()


@given(WINDOWS, st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 99))
def test_packed_texts(windows: Any, lengths: list[int], seed: int) -> None:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    total = int(offsets[-1])
    q, k, v = inputs(1, total, total, seed)
    got = attend_packed_windowed(q, k, v, offsets, table(windows), EVERY, 0.3)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        part = [t[:, :, begin:end] for t in (q, k, v)]
        want = by_hand(*part, windows, lambda row, t, j: j <= t)
        torch.testing.assert_close(got[:, begin:end].double(), want, atol=1e-5, rtol=1e-5)


@given(WINDOWS, st.integers(1, 9), st.integers(0, 9), st.data())
def test_rows_with_holes(windows: Any, tokens: int, past: int, data: st.DataObject) -> None:
    stored = past + tokens
    real = [[data.draw(st.booleans()) for _ in range(stored - 1)] + [True] for _ in range(2)]

    def lets(row: int, t: int, j: int) -> bool:
        return j <= past + t and real[row][j] and real[row][past + t]

    mask = torch.tensor(
        [[[lets(b, t, j) for j in range(stored)] for t in range(tokens)] for b in range(2)]
    ).unsqueeze(1)
    q, k, v = inputs(2, tokens, stored, 0)
    got = attend_masked_windowed(q, k, v, mask, table(windows), 0.3)
    want = by_hand(q, k, v, windows, lets)
    sees = mask.any(-1)[:, 0]  # what a token sees that counts for nothing is nobody's business
    torch.testing.assert_close(got[sees].double(), want[sees], atol=1e-5, rtol=1e-5)


def test_bounds_get_the_smaller_window_of_each_layer_and_head() -> None:
    bounds = torch.tensor([[2, 0, EVERY, 9, 0], [0, 0, 5, 9, 0]]).view(2, 1, 1, 5)
    tables = torch.tensor([[[4, 7], [0, EVERY]], [[0, 3], [1, 6]]])
    got = narrowed(bounds, tables)
    assert got.shape == (2, 2, 2, 1, 5)
    assert got[..., 0, Bounds.WINDOW].tolist() == [[[7, EVERY], [5, 5]], [[3, 6], [3, 5]]]
    assert got[..., 0, Bounds.SINKS].tolist() == [[[4, 0], [4, 0]], [[0, 1], [0, 1]]]
    for column in (Bounds.END, Bounds.BASE):
        assert torch.equal(got[..., column], bounds[..., column].expand(2, 2, 2, 1))
    assert got[..., 0, Bounds.FIRST].tolist() == [[[2, 2], [0, 0]]] * 2


@given(WINDOWS, st.integers(1, 12), st.integers(0, 12), st.integers(1, 30), st.integers(0, 99))
def test_what_training_runs_instead(
    windows: Any, tokens: int, past: int, own: int, seed: int
) -> None:
    """The same numbers, and gradients."""
    if own < past + tokens:  # the model's own window has no sinks
        windows = [(0, last) for _, last in windows]
    q, k, v = inputs(1, tokens, past + tokens, seed)
    q.requires_grad_()
    got = plain_attention.windowed(q, k, v, table(windows), own, 0.3)
    want = attend_windowed(q.detach(), k, v, table(windows), own, 0.3)
    torch.testing.assert_close(got.detach(), want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(("own", "sinks"), [(5, 0), (EVERY, 2)])
def test_another_window_in_training_is_noticed(own: int, sinks: int) -> None:
    """The companion: one token more of the model's own window, or a sink."""
    q, k, v = inputs(1, 12, 12, 0)
    want = attend_windowed(q, k, v, table([(sinks, 6)] * HEADS), own, 0.3)
    right = plain_attention.windowed(q, k, v, table([(sinks, 6)] * HEADS), own, 0.3)
    torch.testing.assert_close(right, want, atol=1e-5, rtol=1e-5)
    wrong = (5 + 1, 0) if own == 5 else (EVERY, 3)
    other = plain_attention.windowed(q, k, v, table([(wrong[1], 6)] * HEADS), wrong[0], 0.3)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(other, want, atol=1e-5, rtol=1e-5)
