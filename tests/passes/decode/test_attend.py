"""`attend` in plain torch against attention key by key; `tests/gpu` has its kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adaskip_passes.attention.ops import attend_causal, attend_packed
from adaskip_passes.decode.ops import EVERY, Bounds, attend, store_and_attend
from tests.support import attention_oracle as oracle
from tests.support.eager_reference import relative_error


@pytest.mark.parametrize("name", oracle.CASES)
def test_what_is_seen(name: str) -> None:
    case = oracle.make(1, **oracle.CASES[name])  # type: ignore[arg-type]
    got = attend(*case.arguments())
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", oracle.CASES)
def test_own_tokens_are_stored_and_seen(name: str, rotary: bool) -> None:
    case = oracle.make(2, **oracle.CASES[name])  # type: ignore[arg-type]
    step = oracle.step(case, rotary, by_row=name == "ragged")
    got: Any = store_and_attend(*step.arguments())
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5
    for buffer, stored in zip((step.keys, step.values), step.stored(), strict=True):
        assert relative_error(buffer.nan_to_num(), stored) < 1e-6


@pytest.mark.parametrize("by_row", [False, True])
def test_an_angle_may_be_of_a_pair(by_row: bool) -> None:
    case = oracle.make(3, batch=2, tokens=3, lengths=(30, 2))
    step = oracle.of_pairs(oracle.step(case, rotary=True, by_row=by_row))
    got: Any = store_and_attend(*step.arguments())
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5


@pytest.mark.parametrize("rotary", [False, True])
def test_padding_that_reaches_into_a_step_is_not_seen(rotary: bool) -> None:
    step = oracle.padded_into(rotary, torch.float32, "cpu")
    got: Any = store_and_attend(*step.arguments())
    assert relative_error(got.double(), oracle.expected(step.case)) < 1e-5
    assert (got[:, :2] == 0).all(), "nothing is seen by padding"


@pytest.mark.breaks
def test_padding_that_is_not_told_is_seen() -> None:
    """The companion."""
    step = oracle.padded_into(False, torch.float32, "cpu")
    for tensor in (step.keys, step.values):
        tensor.nan_to_num_(0.5)
    *before, bounds, scale, softcap, sinks, _, _ = step.arguments()
    assert isinstance(bounds, torch.Tensor)
    bounds[..., Bounds.FIRST] -= 1
    wrong: Any = store_and_attend(*before, bounds, scale, softcap, sinks)
    assert relative_error(wrong.double(), oracle.expected(step.case)) > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 12])
@pytest.mark.parametrize("name", ["ragged", "several queries", "values of another dimension"])
def test_kinds_of_rotation(name: str, rotary_dim: int, interleaved: bool) -> None:
    case = oracle.make(6, **oracle.CASES[name])  # type: ignore[arg-type]
    by_row = name == "ragged"
    for pairs in (False, True):
        step = oracle.step(case, True, by_row, rotary_dim, interleaved)
        step = oracle.of_pairs(step) if pairs else step
        got: Any = store_and_attend(*step.arguments())
        assert relative_error(got.double(), oracle.expected(case)) < 1e-5
        for buffer, stored in zip((step.keys, step.values), step.stored(), strict=True):
            assert relative_error(buffer.nan_to_num(), stored) < 1e-5


@pytest.mark.breaks
@pytest.mark.parametrize("change", [{"rotary_dim": 8}, {"interleaved": False}])
def test_the_kind_of_rotation_matters(change: dict[str, Any]) -> None:
    """The companion."""
    case = oracle.make(6, tokens=3)
    step = replace(oracle.step(case, True, rotary_dim=12, interleaved=True), **change)
    if "rotary_dim" in change:
        assert step.cosines is not None
        assert step.sines is not None
        step = replace(step, cosines=step.cosines[..., :8], sines=step.sines[..., :8])
    wrong: Any = store_and_attend(*step.arguments())
    assert relative_error(wrong.double(), oracle.expected(case)) > 1e-2


@pytest.mark.breaks
def test_angles_matter() -> None:
    """The companion."""
    case = oracle.make(2, tokens=3)
    step = oracle.step(case, rotary=True)
    assert step.sines is not None
    step.sines = -step.sines
    wrong: Any = store_and_attend(*step.arguments())
    assert relative_error(wrong.double(), oracle.expected(case)) > 1e-2


@pytest.mark.breaks
@pytest.mark.parametrize(
    ("column", "change"), [("FIRST", 1), ("SINKS", 3), ("WINDOW", -2), ("END", -1), ("BASE", 1)]
)
def test_each_column_matters(column: str, change: int) -> None:
    """The companion."""
    case = oracle.make(3, windows=(12,), sinks=(4,), lengths=(60,))
    expected = oracle.expected(case)
    case.keys.nan_to_num_(0.5)
    case.values.nan_to_num_(0.5)
    bounds = case.bounds
    bounds[..., Bounds[column]] += change
    query, keys, values, _, *rest = case.arguments()
    wrong: Any = attend(query, keys, values, bounds, *rest)
    assert relative_error(wrong.double(), expected) > 1e-3


@pytest.mark.parametrize("name", ["ragged", "everything", "by head"])
def test_it_is_a_proper_operator(name: str) -> None:
    case = oracle.make(1, **oracle.CASES[name])  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.adaskip.attend.default, case.arguments())
    for rotary in (False, True):
        step = oracle.step(case, rotary)
        torch.library.opcheck(torch.ops.adaskip.store_and_attend.default, step.arguments())
    step = oracle.step(case, True, rotary_dim=8, interleaved=True)
    torch.library.opcheck(torch.ops.adaskip.store_and_attend.default, step.arguments())


def test_the_others_are_proper_operators() -> None:
    query, kv = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    short = query[:, :, :3].contiguous()
    torch.library.opcheck(torch.ops.adaskip.attend_causal.default, (short, kv, kv, 0.3))
    torch.library.opcheck(torch.ops.adaskip.attend_packed.default, (query, kv, kv, offsets, 0.3))


def test_the_table_is_as_documented() -> None:
    assert [column.name for column in Bounds] == ["FIRST", "SINKS", "WINDOW", "END", "BASE"]
    assert EVERY == oracle.EVERY


@pytest.mark.parametrize(("tokens", "stored"), [(2, 9), (5, 6), (7, 7), (1, 4)])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_last_queries_are_causal(tokens: int, stored: int, heads: int) -> None:
    """It is `attend` with the first query at the first new token."""
    case = oracle.make(tokens, heads=heads, tokens=tokens, lengths=(stored - tokens + 1,))
    case.table = [[(0, 0, EVERY, stored - tokens + 1, 0)]]
    keys, values = (torch.randn(1, 2, stored, 16) for _ in range(2))
    case.keys, case.values = keys, values
    got = attend_causal(case.query, keys, values, case.scale)
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5


def test_packed_texts_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    lengths, heads = (5, 1, 9), 4
    query, keys, values = (torch.randn(1, h, 15, 8) for h in (heads, 2, 2))
    offsets = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    got = attend_packed(query, keys, values, offsets, 0.3)
    for begin, length in zip(offsets.tolist(), lengths, strict=False):
        text = [t[:, :, begin : begin + length] for t in (query, keys, values)]
        case = oracle.Case(*text, [[(0, 0, EVERY, 1, 0)]], 0.3, 0.0, None)
        expected = oracle.expected(case)
        assert relative_error(got[:, begin : begin + length].double(), expected) < 1e-5
