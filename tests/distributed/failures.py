"""Checks of `worker` in which a rank fails; the other one tells what it is told, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from adaskip_fx.runtime.step import Runner

_IDS = torch.tensor([[5, 6, 7, 8]])


def told(work: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        work()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"text": text, "seconds": time.monotonic() - start}
    return {"text": "nothing was raised", "seconds": time.monotonic() - start}


def raising(shared: Any) -> Any:
    """A rank raises before a graph is captured, for which the others wait on the host."""
    return _one_fails(shared, shared.fast.adaskip.new_cache())


def blocked(shared: Any) -> Any:
    """A rank raises in a step, and the others wait for it in a sum over ranks."""
    cache = shared.fast.adaskip.new_cache()
    for ids in (_IDS, _IDS[:, :1]):  # captured and linked
        shared.fast(ids, past_key_values=cache)
    return _one_fails(shared, shared.fast.adaskip.new_cache())


def _one_fails(shared: Any, cache: Any) -> Any:
    shared.fast(_IDS, past_key_values=cache)
    if shared.rank == 1:
        Runner._on_views = _out_of_memory  # type: ignore[method-assign]
    step = told(lambda: shared.fast(_IDS[:, :1], past_key_values=cache))
    until_all_are_told(shared)
    return step


def until_all_are_told(shared: Any) -> None:
    """Live on until the other rank knows, or has ended, as a process that catches its errors."""
    (shared.folder / f"told-{shared.rank}").write_text("told")
    other = int((shared.folder / f"process-{1 - shared.rank}").read_text())
    with contextlib.suppress(ProcessLookupError):
        while not (shared.folder / f"told-{1 - shared.rank}").is_file():
            os.kill(other, 0)  # there is no such process any more when its parent has seen it end
            time.sleep(0.1)


def stopped(shared: Any) -> Any:
    """A rank is stopped, and neither ends nor answers."""
    shared.fast(_IDS)
    if shared.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return told(lambda: shared.fast(_IDS))


def _out_of_memory(*_step: Any) -> Any:
    raise torch.OutOfMemoryError("the device is full")


CHECKS: dict[str, Callable[[Any], Any]] = {
    check.__name__: check for check in (raising, blocked, stopped)
}
