"""Mixers' prompts in chunks against the same token by token, in float64.

The loops here share no code with what they check. 1e-10 is what sums of some hundred terms of
double precision lose in another order, with room.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaskip_passes.mixers import delta_rule, other_kernels, state_space
from adaskip_passes.mixers.carry import carry_decayed, carry_products
from adaskip_passes.mixers.delta_rule import gated_delta_rule
from adaskip_passes.mixers.state_space import scan_in_chunks, selective_scan

DOUBLE = torch.float64
LENGTHS = (1, 2, 15, 16, 17, 40, 64)
#: Tokens by token -----------------------------------------------------------------------------


def delta_by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``S <- exp(g) S``, ``S <- S + k beta (v - k^T S)^T``, ``o = S^T q``, a head at a time."""
    rows, tokens, heads, width = q.shape
    outputs = torch.zeros(rows, tokens, heads, v.shape[-1], dtype=DOUBLE)
    last = torch.zeros(rows, heads, width, v.shape[-1], dtype=DOUBLE)
    for b in range(rows):
        for h in range(heads):
            s = torch.zeros(width, v.shape[-1], dtype=DOUBLE) if state is None else state[b, h]
            for t in range(tokens):
                s = torch.diag(g[b, t, h].exp().expand(width)) @ s
                missing = v[b, t, h] - k[b, t, h] @ s
                s = s + torch.outer(k[b, t, h], beta[b, t, h] * missing)
                outputs[b, t, h] = q[b, t, h] @ s
            last[b, h] = s
    return outputs, last


def states_by_token(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``h <- exp(dt a) h + dt x b^T``, ``y = h c``, a head at a time."""
    rows, tokens, heads, width = x.shape
    each = heads // b.shape[2]
    outputs = torch.zeros_like(x)
    last = torch.zeros(rows, heads, width, b.shape[3], dtype=DOUBLE)
    for r in range(rows):
        for i in range(heads):
            h = last[r, i] if state is None else state[r, i]
            for t in range(tokens):
                taken = torch.outer(dt[r, t, i] * x[r, t, i], b[r, t, i // each])
                h = (dt[r, t, i] * a[i]).exp() * h + taken
                outputs[r, t, i] = h @ c[r, t, i // each]
            last[r, i] = h
    return outputs, last


def delta_inputs(tokens: int, by_channel: bool, filled: bool) -> tuple[Any, ...]:
    torch.manual_seed(tokens)
    rows, heads, width, values = 2, 2, 4, 3
    q, k = (torch.randn(rows, tokens, heads, width, dtype=DOUBLE) for _ in range(2))
    v = torch.randn(rows, tokens, heads, values, dtype=DOUBLE)
    shape = (rows, tokens, heads, width) if by_channel else (rows, tokens, heads)
    g, beta = -torch.rand(shape, dtype=DOUBLE), torch.rand(rows, tokens, heads, dtype=DOUBLE)
    state = torch.randn(rows, heads, width, values, dtype=DOUBLE) if filled else None
    return q, k / k.norm(dim=-1, keepdim=True), v, g, beta, state


def state_inputs(tokens: int, groups: int, filled: bool) -> tuple[Any, ...]:
    torch.manual_seed(tokens)
    rows, heads, width, size = 2, 4, 3, 5
    x, dt = torch.randn(rows, tokens, heads, width), torch.rand(rows, tokens, heads)
    b, c = (torch.randn(rows, tokens, groups, size) for _ in range(2))
    state = torch.randn(rows, heads, width, size) if filled else None
    given = (x, dt, -3 * torch.rand(heads), b, c, state)
    return tuple(t if t is None else t.double() for t in given)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("by_channel", [False, True], ids=["of heads", "of channels"])
def test_a_delta_rule_in_chunks(by_channel: bool, filled: bool) -> None:
    for tokens in LENGTHS:
        given = delta_inputs(tokens, by_channel, filled)
        assert_same(gated_delta_rule(*given, chunk=16), delta_by_token(*given))


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("groups", [1, 2])
def test_states_in_chunks(groups: int, filled: bool) -> None:
    for tokens in LENGTHS:
        given = state_inputs(tokens, groups, filled)
        assert_same(scan_in_chunks(*given, chunk=16), states_by_token(*given))


def test_many_chunks() -> None:
    """More than one level of the recurrence over chunks: 75 of them."""
    given = state_inputs(300, 1, filled=True)
    assert_same(scan_in_chunks(*given, chunk=4), states_by_token(*given))


@pytest.mark.parametrize("chunked", [gated_delta_rule, scan_in_chunks])
def test_a_state_that_is_not_handed_on_would_be_seen(
    chunked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((delta_rule, "carry_products"), (state_space, "carry_decayed")):
        carry = getattr(module, name)
        lost: Callable[..., Tensor] = lambda f, t, initial, c=carry: c(0 * f, t, initial)  # noqa: E731
        monkeypatch.setattr(module, name, lost)
    made, by_token = (
        (delta_inputs(40, False, True), delta_by_token)
        if chunked is gated_delta_rule
        else (state_inputs(40, 1, True), states_by_token)
    )
    with pytest.raises(AssertionError, match="not close"):
        assert_same(chunked(*made, chunk=16), by_token(*made))


@pytest.mark.parametrize("at_once", [2**21, 1], ids=["at once", "16 tokens at once"])
def test_mambas_scan(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each channel is a head of its own, whose numbers decay by themselves."""
    monkeypatch.setitem(state_space._AT_ONCE, "cpu", at_once)
    for tokens in (*LENGTHS, 300):
        x, dt, a = (
            torch.randn(2, 3, tokens).double(),
            torch.rand(2, 3, tokens).double(),
            -torch.rand(3, 5).double(),
        )
        b, c = (torch.randn(2, 5, tokens).double() for _ in range(2))
        h, outputs = torch.zeros(2, 3, 5).double(), []
        for t in range(tokens):
            taken = (dt[..., t] * x[..., t])[..., None] * b[:, None, :, t]
            h = (dt[..., t, None] * a).exp() * h + taken
            outputs.append((h * c[:, None, :, t]).sum(-1))
        assert_same(selective_scan(x, dt, a, b, c), (torch.stack(outputs, -1), h))


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_the_operators_are_what_they_say_they_are(filled: bool) -> None:
    """Shapes and strides of their fake forms, no aliases, no writes."""
    checks = ("test_schema", "test_faketensor")
    square, terms = torch.rand(2, 3, 4, 5, 5), torch.rand(2, 3, 4, 5, 6)
    initial = torch.rand(2, 3, 5, 6) if filled else None
    torch.library.opcheck(carry_products, (square, terms, initial), test_utils=checks)
    decayed = torch.rand(2, 4, 3), torch.rand(2, 4, 3, 5, 6), initial
    torch.library.opcheck(carry_decayed, decayed, test_utils=checks)
    scanned = (*torch.rand(2, 2, 3, 7), -torch.rand(3, 5), *torch.rand(2, 2, 5, 7))
    torch.library.opcheck(selective_scan, scanned, test_utils=checks)


# Kernels of other libraries, for which plain functions stand here --------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, **kernels: Callable[..., Any]) -> None:
    monkeypatch.setattr(other_kernels, "_found", lambda module, name: kernels.get(name))


def test_kernels_of_others_get_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def rule(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        asked.append(given)
        return v.clone(), given["initial_state"]  # which a kernel may hand back

    def scan(x: Tensor, *rest: Any, **given: Any) -> tuple[Tensor, Tensor]:
        asked.append(given)
        return x.clone(), torch.zeros(2, 2, 3, 5)

    stand_in(monkeypatch, chunk_gated_delta_rule=rule, mamba_chunk_scan_combined=scan)
    q, k, v, g, beta, state = (t.float() for t in delta_inputs(7, False, True))
    output, last = other_kernels.fla_delta_rule(q, k, v, g, beta, state, True)
    assert torch.equal(output, v)
    assert torch.equal(last, state)
    assert last.data_ptr() != state.data_ptr()
    assert asked[0]["use_qk_l2norm_in_kernel"]
    assert asked[0]["output_final_state"]
    x, dt, a, b, c, _ = state_inputs(7, 1, False)
    other_kernels.mamba_ssm_chunk_scan(x, dt, a, b, c, 64, None, a, None, True, 0.0, 2.0)
    assert asked[1]["dt_limit"] == (0.0, 2.0)
    assert asked[1]["return_final_states"]
    assert torch.equal(asked[1]["dt_bias"], a)


def test_a_kernel_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(RuntimeError, match="install its library again, or compile the model again"):
        other_kernels.fla_delta_rule(*(t.float() for t in delta_inputs(2, True, True)), True)


def test_kernels_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, chunk_gated_delta_rule=print, chunk_kda=print, selective_scan_fn=print)
    ask = other_kernels.delta_rule_is_installed, other_kernels.selective_scan_is_installed
    assert [known(torch.device("cpu")) for known in ask] == [False, False]
    assert [known(torch.device("cuda")) for known in ask] == [True, True]
    assert not other_kernels.chunk_scan_is_installed(torch.device("cuda"))


@pytest.mark.parametrize("installed", [False, True])
def test_a_trace_does_not_import_them(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    for module, name in (other_kernels._DELTA_RULE, other_kernels._BY_CHANNEL):
        library = types.SimpleNamespace(**{name: print}) if installed else None
        monkeypatch.setitem(sys.modules, module, library)
    other_kernels._found.cache_clear()
    torch._dynamo.reset()

    def traced(x: Tensor) -> Tensor:
        return x + other_kernels.delta_rule_is_installed(torch.device("cuda"))

    graph = torch.compile(traced, backend="eager", fullgraph=True)
    assert graph(torch.zeros(1)).item() == installed
    other_kernels._found.cache_clear()
