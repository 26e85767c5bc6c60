"""Steps that take turns on a clock that was made up, and the clock of a model as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip_fx.kv_cache.argument_names import cache_of
from adaskip_fx.measurement import timer
from adaskip_fx.measurement.bench import StepTimes, time_steps
from adaskip_fx.measurement.environment import environment
from adaskip_fx.measurement.timer import EagerTimer
from tests.support.command_line import make_model


def test_all_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[tuple[str, str, int]] = []
    progress: list[tuple[int, int]] = []

    def clock(name: str) -> Any:
        def seconds(phase: str, context: int) -> float:
            calls.append((name, phase, context))
            return float(len(calls))

        return seconds

    times = time_steps(
        {name: clock(name) for name in "ab"}, [8], 2, lambda *at: progress.append(at)
    )
    names = [name for name, phase, _ in calls if phase == "prefill"]
    assert names == ["a", "b", "b", "a", "a", "b"]  # there, back, and there again
    assert [(t.contender, t.phase, t.context) for t in times] == [
        (name, phase, 8) for phase in ("prefill", "decode") for name in "ab"
    ]
    assert [t.seconds for t in times[:2]] == [(4.0, 5.0), (3.0, 6.0)]
    assert progress == [(i, 6) for i in range(7)]


def test_what_is_said_of_times() -> None:
    times = StepTimes("a", "decode", 64, (3.0, 1.0, 9.0))
    assert times.median == 3.0
    assert times.to_json() == {
        **{"contender": "a", "phase": "decode", "context": 64},
        **{"median": 3.0, "min": 1.0, "max": 9.0, "seconds": [3.0, 1.0, 9.0]},
    }


def test_the_clock_of_a_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs whole prompts and single steps, the last of which stores token `context`."""
    model, seen = make_model(), list[tuple[int, int, int]]()
    forward = type(model).forward
    now = iter(range(1000))
    monkeypatch.setattr(timer.time, "perf_counter", lambda: float(next(now)))

    def spy(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(self, input_ids=input_ids, **options)
        seen.append((input_ids.shape[0], input_ids.shape[1], cache_of(output).get_seq_length()))
        return output

    clock = EagerTimer(model, batch=2, steps=3)
    monkeypatch.setattr(model, "forward", spy.__get__(model))
    assert clock("prefill", 20) == 1.0
    assert seen == [(2, 20, 20)]
    seen.clear()
    assert clock("decode", 20) == 1.0
    assert seen == [(2, 16, 16), *((2, 1, 17 + i) for i in range(4))]


def test_an_environment_names_device_and_versions() -> None:
    about = environment(torch.empty(0))
    assert set(about) == {
        *("device", "processor", "threads", "cores", "python", "torch", "transformers"),
        "adaskip_fx",
    }
    assert about["device"].startswith("CPU (")
    assert about["torch"] == str(torch.__version__)
    assert about["threads"] == torch.get_num_threads()
