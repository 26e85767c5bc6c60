"""Stores are part of the attention that reads what they wrote; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_fx.api import build
from adaskip_fx.capture import phase_graph
from adaskip_passes.decode.fuse_attention import FuseAttention
from adaskip_passes.decode.ops import EVERY
from tests.support.compiled_llamas import Entry, Oracle, check_request, make_model

STORE = torch.ops.adaskip.store.default
ATTEND = torch.ops.adaskip.attend.default


def step(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor
) -> Any:
    STORE(keys, k, p)
    STORE(values, v, p)
    return ATTEND(q, keys, values, b, 0.5, 0.0, None)


def read_elsewhere(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor
) -> Any:
    STORE(keys, k, p)
    STORE(values, v, p)
    return ATTEND(q, keys, values, b, 0.5, 0.0, None) + keys.narrow(2, 0, 1).sum()


def stored_twice(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor
) -> Any:
    STORE(keys, k * 2, p)
    return step(q, keys, values, k, v, p, b)


def other_positions(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor
) -> Any:
    STORE(keys, k, p)
    STORE(values, v, p + 0)
    return ATTEND(q, keys, values, b, 0.5, 0.0, None)


def attends_first(
    q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, p: Tensor, b: Tensor
) -> Any:
    result = ATTEND(q, keys, values, b, 0.5, 0.0, None)
    STORE(keys, k, p)
    STORE(values, v, p)
    return result


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    bounds = torch.tensor([[[[1, 0, EVERY, 6, 0]]], [[[0, 0, 4, 6, 0]]]])
    keys, values = (torch.randn(2, 2, 12, 8) for _ in range(2))
    new = [torch.randn(2, 2, 3, 8) for _ in range(2)]
    return torch.randn(2, 4, 3, 8), keys, values, *new, torch.tensor([5, 5]), bounds


def both(function: Callable[..., Any]) -> tuple[int, bool]:
    """How many attentions store, and whether results and buffers are the same to the bit."""
    one, two = inputs(), inputs()
    module = fx.symbolic_trace(function)
    changes = FuseAttention()(module).changes
    module.graph.lint()
    module.recompile()
    same = torch.equal(function(*one), module(*two))
    return changes, same and all(map(torch.equal, one, two))


def test_stores_before_attention_become_part_of_it() -> None:
    assert both(step) == (1, True)


@pytest.mark.parametrize("function", [read_elsewhere, stored_twice, other_positions, attends_first])
def test_what_anything_else_has_to_do_with_stays(function: Callable[..., Any]) -> None:
    assert both(function) == (0, True)


def test_steps_of_a_model_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = []

    class Counted(FuseAttention):
        def __call__(self, graph_module: fx.GraphModule) -> Any:
            result = super().__call__(graph_module)
            changes.append(result.changes)
            return result

    monkeypatch.setattr(
        phase_graph, "_lowering", lambda key, _: (Counted(),) if key.static_cache else ()
    )
    monkeypatch.setattr("adaskip_passes.linking.piece_compiler._SHORT_KERNELS", {})
    model = make_model("grouped")
    bank = Entry(model, build(model, None, backend="aot_eager", static_cache=True), Oracle(model))
    with bank.using():
        check_request(bank, bank.plan(), (5, 1, 1, 4, 1), batch=2)
    assert sum(changes) == 2, "one piece for decoding, one for four tokens"
