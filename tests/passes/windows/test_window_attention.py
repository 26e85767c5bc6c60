"""The pass that gives windows: what it refuses, and that it leaves the captured graph alone."""

from __future__ import annotations

import pytest

from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.programs.rewrite import rewrite, window_tensors
from adaskip_passes import Skip, UnsupportedError, run_passes
from adaskip_passes.infra.graph_module import text
from adaskip_passes.partition.outer import piece_of, sublayer_calls
from adaskip_passes.transforms.skip import Replacement
from adaskip_passes.windows.find_attention import attention_of
from adaskip_passes.windows.window_attention import WindowAttention, window_inputs
from tests.support.compiled_llamas import entry
from tests.support.fx_decoders import Shape, shared


def captured(name: str = "grouped") -> object:
    bank = entry(name)
    found = bank.runtime.graphs.states.current.captures
    return next(group[0] for key, group in found.items() if key.phase == "prefill")


def test_the_captured_graph_is_left_as_it_was() -> None:
    phase = captured()
    before, keys = text(phase.outer), _keys(phase.outer)  # type: ignore[attr-defined]
    windowed = run_passes(phase.outer, (WindowAttention((0, 2)),))  # type: ignore[attr-defined]
    assert text(phase.outer) == before  # type: ignore[attr-defined]
    assert _keys(phase.outer) == keys  # type: ignore[attr-defined]
    assert window_inputs(windowed.graph) == {"windows_0": (0,), "windows_2": (2,)}
    new = _keys(windowed)
    assert new[0] == new[2] != keys[0]
    assert {i for i in keys if new[i] != keys[i]} == {0, 2}
    assert "windows_2" in text(windowed)


def _keys(outer: object) -> dict[int, str]:
    calls = sublayer_calls(outer.graph)  # type: ignore[attr-defined]
    return {i: piece.key for i, call in calls.items() if (piece := piece_of(call)) is not None}


def test_tables_are_on_the_cpu_for_prompts() -> None:
    phase, bank = captured(), entry("grouped")
    sublayers = phase.sublayers  # type: ignore[attr-defined]
    windows = Windows.of({sublayers[0]: Window(9, 2, (1,))})
    plan = bank.plan().with_windows(windows)
    outer = rewrite(phase.outer, sublayers, plan, "prefill")  # type: ignore[attr-defined]
    (table,) = window_tensors(outer, sublayers, windows.prefill).values()
    assert table.device.type == "cpu"
    assert table.tolist() == [[2, 9], [0, 2**31 - 1]]


def test_what_is_not_in_the_graph() -> None:
    skipped = run_passes(captured().outer, (Skip({0: Replacement()}),))  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="sublayer 0 is not in the graph: it sees nothing"):
        run_passes(skipped, (WindowAttention((0,)),))


def test_attention_that_is_not_known() -> None:
    outer = shared(Shape()).outer
    with pytest.raises(UnsupportedError, match=r"layer 0's ffn cannot have a window: its attent"):
        run_passes(outer, (WindowAttention((1,)),))


def test_what_is_known_of_attention() -> None:
    calls = sublayer_calls(captured().outer.graph)  # type: ignore[attr-defined]
    piece = piece_of(calls[0])
    assert piece is not None
    found = attention_of(piece)
    assert (found.kv_heads, found.sees) == (2, "everything")
