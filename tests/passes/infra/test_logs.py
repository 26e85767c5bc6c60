"""What is done is told: to Python's logging (by way of TORCH_LOGS too), and to torch's trace."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
from torch import fx, nn

from adaskip_passes import Replacement, Skip, Tap, canonicalize, fuse, link, run_passes
from adaskip_passes.infra import logs, pass_manager
from adaskip_passes.infra.graph_module import text
from adaskip_passes.partition.outer import Outer
from adaskip_passes.transforms.dead_code import EliminateDeadCode
from tests.support.fx_decoders import (
    Decoder,
    NeoX,
    Shape,
    arguments,
    cut_block,
    shared,
    step,
    trace,
)

SKIP = Skip({1: Replacement("nothing", "scale")})
TRACE = logging.getLogger("torch.__trace")


class _Reader(logging.Handler):
    """Keeps artifacts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.artifacts: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        metadata, payload = vars(record)["metadata"], vars(record)["payload"]
        if "artifact" in metadata:
            self.artifacts[metadata["artifact"]["name"]] = payload


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> _Reader:
    """What reads torch's structured trace, in place of a file."""
    handler = _Reader()
    monkeypatch.setattr(TRACE, "handlers", [handler])
    return handler


# logging -----------------------------------------------------------------------------------------


def test_a_pass_is_told_with_the_graph_before_and_after_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outer = shared(Shape()).outer
    caplog.set_level(logging.DEBUG, "adaskip_fx")
    steps: list[pass_manager.Step] = []
    changed = run_passes(outer, (SKIP,), steps.append)
    records = [r for r in caplog.records if r.name != TRACE.name]  # torch 2.11 hands it on
    assert {r.name for r in records} == {"adaskip_fx.passes.infra.pass_manager"}
    assert {r.levelno for r in records} == {logging.DEBUG}
    first, *rest = (r.getMessage() for r in records)
    assert re.fullmatch(r"Skip: 1 changes \(\d+\.\d\d ms\)", first)
    assert rest == [
        f"graph before Skip:\n{text(outer)}",
        f"graph after Skip:\n{text(changed)}",
        f"diff of Skip:\n{steps[0].diff()}",
    ]


def test_a_pass_that_changes_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    outer = shared(Shape()).outer
    caplog.set_level(logging.DEBUG, "adaskip_fx")
    run_passes(outer, (Skip({}),))
    (message,) = caplog.messages
    assert re.fullmatch(r"Skip changed nothing \(\d+\.\d\d ms\)", message)


def test_passes_of_every_level_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Captured, outer and of a piece, in the order in which they ran."""
    shape, outer = Shape(layers=1), shared(Shape()).outer
    caplog.set_level(logging.DEBUG, "adaskip_fx")
    canonicalize(trace(step, **arguments(Decoder(shape, NeoX), shape)).graph)
    run_passes(outer, (Tap(),))
    graph_module = fx.symbolic_trace(lambda x: (x, x + 1)[0])
    run_passes(graph_module, (EliminateDeadCode(),))
    found = [re.match(r"(\w+)(?:: \d+ changes| changed nothing)", m) for m in caplog.messages]
    assert [m[1] for m in found if m] == [
        "Unflatten",
        "Upcast",
        "SerializeBranches",
        "Tap",
        "EliminateDeadCode",
    ]


def test_what_is_made_of_a_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adaskip_fx")
    got = cut_block(NeoX)
    link(got.outer, got.compiler)
    fuse(got.outer)
    assert {r.levelno for r in caplog.records} == {logging.INFO}
    shown = [re.sub(r"[\d.]+ (m?s|nodes)\b", r"# \1", m) for m in caplog.messages]
    assert shown == [
        "captured step: # nodes in # s",
        "outlined 6 pieces, 4 of them distinct",
        "compiled prologue with eager in # s",
        "compiled layers_0_attention with eager in # s",
        "compiled layers_0_ffn with eager in # s",
        "compiled epilogue with eager in # s",
        "linked 5 functions in # ms",
        "fused into # nodes",
    ]


def test_no_text_is_made_where_it_is_not_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "adaskip_fx")
    monkeypatch.setattr(TRACE, "handlers", [])
    made: list[str] = []
    for kind, method in ((fx.Graph, "__str__"), (Outer, "text")):
        monkeypatch.setattr(kind, method, lambda self: made.append("made") or "")
    got = cut_block(NeoX, 1)
    link(run_passes(got.outer, (Tap(),)), got.compiler)
    assert caplog.messages
    assert made == []
    caplog.set_level(logging.DEBUG, "adaskip_fx")
    run_passes(got.outer, (Tap(),))
    assert made == ["made", "made"]


@pytest.mark.slow
def test_torch_logs_takes_the_name_of_the_package() -> None:
    """And the loggers of the passes lie below it."""
    source = (
        "import torch\n"
        "from adaskip_passes import run_passes\n"
        "from adaskip_passes.transforms.dead_code import EliminateDeadCode\n"
        "graph_module = torch.fx.symbolic_trace(lambda x: (x, x + 1)[0])\n"
        "run_passes(graph_module, (EliminateDeadCode(),))\n"
    )

    def said(**variables: str) -> str:
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "PYTHONPATH": path, **variables}
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stderr

    shown = said(TORCH_LOGS="+adaskip_fx")
    assert "EliminateDeadCode: 1 changes" in shown
    assert "graph before EliminateDeadCode:" in shown
    assert "EliminateDeadCode" not in said(TORCH_LOGS="adaskip_fx")


def test_the_loggers_are_called_after_their_modules() -> None:
    logger = logs.logger_of("adaskip_passes.linking.link")
    assert logger is logging.getLogger("adaskip_fx.passes.linking.link")


# torch's structured trace ------------------------------------------------------------------------


def test_the_trace_has_every_rewrite_and_what_was_linked(reader: _Reader) -> None:
    got = shared(Shape())
    changed = run_passes(got.outer, (SKIP, Skip({})))
    link(changed, got.compiler)
    fused = fuse(changed)
    assert reader.artifacts == {
        "adaskip_before_Skip": text(got.outer),
        "adaskip_after_Skip": text(changed),
        "adaskip_linked": text(changed),
        "adaskip_fused": text(fused),
    }


def test_without_a_reader_the_trace_makes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise AssertionError("nobody reads it")

    monkeypatch.setattr(TRACE, "handlers", [])
    assert not logs.is_traced()
    logs.trace_text("nothing", refuse)
    deaf = _Reader()
    deaf.setLevel(logging.WARNING)  # as those that pytest adds
    monkeypatch.setattr(TRACE, "handlers", [deaf])
    logs.trace_text("nothing", refuse)
    monkeypatch.setattr(TRACE, "handlers", [_Reader()])
    assert logs.is_traced()
    with pytest.raises(AssertionError, match="nobody reads it"):
        logs.trace_text("something", refuse)


def test_a_plain_graph_is_shown_as_fx_shows_it() -> None:
    module = fx.GraphModule(nn.Module(), fx.symbolic_trace(lambda x: -x).graph)
    assert text(module) == str(module.graph)
