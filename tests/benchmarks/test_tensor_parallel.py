"""The benchmark of several ranks on tiny shapes: in one process, and on two over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models, tensor_parallel
from benchmarks.tensor_parallel import comparisons, processes, subject

ROOT = Path(__file__).parents[2]
_WHAT = (
    *("logits of 16 tokens, 4 layers: ours beside theirs",),
    *("logits of 16 tokens, 4 layers: ours beside theirs in float32",),
    *("logits of 16 tokens, 4 layers: theirs beside theirs in float32",),
    *("logits of 16 tokens, 4 layers, float32: ours beside theirs",),
    *("step at 16: floor", "step at 16: transformers"),
    *("step at 32: floor", "step at 32: transformers"),
    *("prompt of 48: floor", "prompt of 48: transformers"),
    "step at 16, 2 of 8 skipped: share of promise",
    "prompt of 48, 2 of 8 skipped: share of promise",
    "step with a new plan (largest of 2): the same again",
    "K/V of a rank, room for 256 tokens: its share",
)
_AFTER_STEPS = 8  # what two ranks say besides


@pytest.fixture(scope="module")
def result() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "device", lambda: torch.device("cpu"))
        patch.setattr(comparisons, "copy_rate", lambda device: 1e9)
        patch.setattr(comparisons.MatrixRate, "sustained", lambda self: 1e12)
        patch.setattr(comparisons, "_rates", {})
        yield tensor_parallel.measure(only=("8B",))


def test_all_is_measured_in_one_process(result: dict[str, Any]) -> None:
    assert [row.get("what", row) for row in result["rows"]] == list(_WHAT)
    assert result["ranks"] == 1
    assert result["layers"] == {"8B": {"run": 4, "of": 4}}
    by_what = {row["what"]: row for row in result["rows"]}
    for what in _WHAT[:4]:
        assert by_what[what]["measured"] < 0.1  # thousandths
    assert by_what[_WHAT[-1]]["ratio"] == pytest.approx(1)  # all of the heads are this rank's


def test_floors_are_a_ranks_share(result: dict[str, Any]) -> None:
    """4 layers of width 64, 4 heads of 16, 2 K/V heads, 128 in the FFN, 256 words, float32."""
    weights = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * 256
    stored = 4 * 2 * 2 * 16 * (16 + 1)  # halfway through a block of 3 steps
    row = next(row for row in result["rows"] if row["what"] == "step at 16: floor")
    assert row["reference"] == pytest.approx(1000 * 4 * (weights + stored) / 1e9)
    assert row["collectives_ms"] == 0


def test_what_fails_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_subject: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(subject.Subject, "of", lambda name: _Nothing())
    monkeypatch.setattr(comparisons, "PARTS", (failing, lambda _: iter(())))
    rows = tensor_parallel.measure(only=("70B",))["rows"]
    assert rows == [{"situation": "70B", "failed": "failing: OutOfMemoryError: no room"}]


class _Nothing:
    layers = 4

    def begin(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 layers of the 70B shape are 137 GB in bfloat16; two cards of 141 GB hold them."""
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(processes, "largest", lambda value: value)
    shape = subject.SHAPES["70B"]
    for count, memory, layers in ((2, 140e9, 80), (1, 140e9, 54), (1, 1e9, 1)):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda memory=memory: (memory, memory))
        assert shape.fitting(32768) == layers


@pytest.mark.slow
def test_on_two_ranks_the_first_writes(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "benchmarks", "run", "tensor_parallel", "--only", "8B", "--out", str(tmp_path)),
    ]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "passes")])}
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads((tmp_path / "tensor_parallel.json").read_text())
    whats = [row.get("what", row) for row in result["rows"]]
    assert whats.pop(_AFTER_STEPS) == "a sum over ranks in a step: the process group's"
    assert whats == list(_WHAT)
    assert result["ranks"] == 2
    assert ended.stdout.count("tensor_parallel:") == 1
    by_what = {row["what"]: row for row in result["rows"]}
    assert by_what[_WHAT[-1]]["ratio"] == pytest.approx(1)  # half of the heads
    assert by_what["step at 16: floor"]["collectives_ms"] > 0
