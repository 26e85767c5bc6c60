"""One model on several GPUs: a prompt, decode steps, what is skipped and a new plan.

``torchrun --nproc-per-node N -m benchmarks run tensor_parallel`` measures shapes of 8B and of 70B
on N GPUs, beside what transformers' own tensor-parallel model takes in the same processes, and
beside a floor: a rank's share of the weights and of the K/V at the copy rate, or of the products at
the matrix rate, and what the collectives take by themselves, for a step in a CUDA graph. Weights
are random, and each rank makes its own. Without GPUs it runs a tiny shape over gloo; in one process
it measures the same without anything sharded. ``--only 8B`` leaves the other shape out. What fails
is a row, those after it go on, and rows are printed by the first rank as they come.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..situations.rows import line, table
from . import comparisons, processes
from .subject import SHAPES, Subject

#: Relative error of logits beyond which no target is met.
_TOLERANCE = 0.05


def measure(only: Sequence[str] = ()) -> dict[str, Any]:
    """Return the rows of all shapes, or of some.

    Args:
        only: Names of `SHAPES`; all when empty.
    """
    processes.join()
    rows, layers, took = list[dict[str, Any]](), dict[str, Any](), dict[str, float]()
    for name in SHAPES:
        if only and name not in only:
            continue
        start = time.perf_counter()
        for row in _rows(name, layers):
            rows.append(row)
            if processes.rank() == 0:
                print(line(row), file=sys.stderr, flush=True)
        took[name] = time.perf_counter() - start
    return {"ranks": processes.count(), "layers": layers, "rows": rows, "seconds": took}


@torch.no_grad()
def _rows(name: str, layers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one shape; each part that fails is one that says why."""
    try:
        subject = Subject.of(name)
    except Exception as error:
        yield _failed(name, "the model", error)
        return
    layers[name] = {"run": subject.layers, "of": SHAPES[name].layers}
    for part in comparisons.PARTS:
        try:
            subject.begin()
            for row in part(subject):
                yield {"situation": name, **row.document(_TOLERANCE)}
        except Exception as error:
            yield _failed(name, part.__name__, error)
    subject.close()


def _failed(name: str, what: str, error: Exception) -> dict[str, Any]:
    return {"situation": name, "failed": f"{what}: {type(error).__name__}: {error}"}


def summary(result: dict[str, Any]) -> str:
    """Return the rows as a table, how many layers were run, and what each shape took."""
    shapes = (f"{n}: {at['run']} of {at['of']} layers" for n, at in result["layers"].items())
    took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items())
    about = f"{result['ranks']} ranks; {', '.join(shapes)}; seconds: {took}"
    return f"{table(result['rows'])}\n{about}"
