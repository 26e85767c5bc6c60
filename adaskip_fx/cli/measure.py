"""Measure a latency table from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import api
from ..latency.table import LatencyTable
from ..measurement.measure import measure
from ..model.load import load, usable_backend
from ..utils.progress import Steps


def measure_table(
    model: str,
    out: Path,
    contexts: Sequence[int],
    batch: int,
    rounds: int,
    ranks: bool,
    backend: str,
    dtype: str | None,
    device: str,
    steps: Steps,
) -> LatencyTable:
    """Load a model, measure its sublayers and save the table to `out`.

    Args:
        model: a folder, a ``.gguf`` file, or a name on the Hugging Face hub.
        contexts, batch, rounds, ranks: see :func:`adaskip_fx.measurement.measure.measure`.
        backend, dtype, device: how the model runs.
        steps: shows what is going on.

    Raises:
        ValueError: `out` cannot be a file, or contexts that cannot be measured.
    """
    if out.is_dir() or not out.parent.is_dir():  # before minutes of work
        raise ValueError(f"{out}: a table is a file in a folder that exists; choose another path")
    with steps.step("load the model"):
        loaded = load(model, device, dtype)
    usable, why = usable_backend(backend, loaded.model.device)
    if why is not None:
        steps.say(why)
    with steps.step("capture and compile"):
        compiled = api.build(loaded.model, None, backend=usable)
    with steps.step("measure") as advance:
        table = measure(
            compiled, contexts, batch=batch, rounds=rounds, ranks=ranks, progress=advance
        )
    table.save(out)
    return table
