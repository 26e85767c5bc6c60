"""What a step on a static cache is handed: positions that are counted, set, or given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.runtime.static_inputs import StaticInputs

CPU = torch.device("cpu")

#: Steps of up to 4 tokens: new ones, tokens taken back before, whether positions are given.
STEPS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 6), st.booleans()), min_size=1, max_size=8
)


def run(steps: list[tuple[int, int, bool]], rows: int) -> None:
    """Follow steps as a request does them; the oracle writes all positions out each time."""
    inputs, length = StaticInputs(rows, 4, CPU), 5
    for number, (new, back, positioned) in enumerate(steps):
        length = max(1, length - back)
        ids = torch.full((rows, new), number)
        placed = torch.arange(new).expand(rows, new) + 100 * number if positioned else None
        inputs.write(ids, placed, length, None, None)
        for row in range(rows):
            want = [100 * number + i if positioned else length + i for i in range(new)]
            want += [want[-1]] * (4 - new)
            assert inputs.tokens[row, :new].tolist() == [number] * new
            assert inputs.positions[row].tolist() == want
            assert inputs.position[row].item() == length
        inputs.count()
        inputs.counted(length + 4, not positioned and new == 4)
        length += new


@given(STEPS, st.integers(1, 3))
def test_positions_of_any_steps(steps: list[tuple[int, int, bool]], rows: int) -> None:
    run(steps, rows)


@pytest.mark.breaks
def test_what_is_not_counted_on_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: a step that leaves its positions where they are."""
    monkeypatch.setattr(StaticInputs, "count", lambda self: None)
    with pytest.raises(AssertionError):
        run([(4, 0, False)] * 2, 1)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 3, 4, 17])
def test_inputs_begin_where_compiled_code_expects_them(rows: int, tokens: int) -> None:
    inputs: Any = StaticInputs(rows, tokens, CPU)
    for tensor in (inputs.positions, inputs.position):
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() - inputs.all()[1].data_ptr()) % 16 == 0
