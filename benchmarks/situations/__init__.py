"""Situations that users meet, each as a few ratios with what is aimed at, in one process.

``python -m benchmarks run situations`` measures all of them, and with ``--only NAME`` (which may be
repeated) some; the others of an earlier result stay. A floor is what must be read or multiplied,
over what the card was measured to do in the same minute; other references are measured beside.
Before something is timed a short version of it is compared with the eager model. A situation that
fails is a row of its own, and those after it go on; rows are printed as they come, and saved after
each situation.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..conditions import conditions
from . import decoding, families, many_requests, mixers, other_attention, prompts, road
from .bench import Bench
from .rows import Row, line, table

Situation = Callable[[Bench], Iterator[Row]]

SITUATIONS: Mapping[str, Situation] = {
    "main_road": road.main_road,
    "padded_decode": decoding.padded_decode,
    "unpadded_decode": decoding.unpadded_decode,
    "padded_prompt": prompts.padded_prompt,
    "new_length": prompts.new_length,
    "new_batch": prompts.new_batch,
    "growth": decoding.growth,
    "turn": prompts.turn,
    "chunks": prompts.chunks,
    "verify": prompts.verify,
    "logits_to_keep": prompts.logits_to_keep,
    "generate_padded": decoding.generate_padded,
    "many_requests": many_requests.many_requests,
    "other_attention": other_attention.other_attention,
    **{f"family_{n}": functools.partial(families.family, name=n) for n in families.SHAPES},
    **{f"family_{n}": functools.partial(mixers.mixer, name=n) for n in mixers.SHAPES},
}


def measure(
    only: Sequence[str] = (),
    earlier: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Rows of all situations, or of some.

    Args:
        only: names of `SITUATIONS`; all when empty.
        earlier: a result of which the situations that are not measured now are kept, as far as
            they were on the same card and versions.
        save: gets the result as far as it is, after each situation.
    """
    bench = Bench()
    config = bench.model.config
    about = {
        "model": {"layers": config.num_hidden_layers, "hidden": config.hidden_size},
        "dtype": str(bench.model.dtype),
        "tolerance": bench.tolerance,
    }
    rows, runs = _kept(earlier) if earlier and earlier["model"] == about["model"] else ({}, {})
    result: dict[str, Any] = {}
    for name, situation in SITUATIONS.items():
        if only and name not in only:
            continue
        start, rows[name] = time.perf_counter(), []
        for row in _rows(bench, name, situation):
            rows[name].append(row)
            print(line(row), file=sys.stderr, flush=True)
        runs[name] = {"seconds": time.perf_counter() - start, "conditions": conditions()}
        known = [n for n in SITUATIONS if n in rows]
        ordered = {
            "rows": [row for n in known for row in rows[n]],
            "runs": {n: runs[n] for n in known},
        }
        result = {**about, **ordered}
        save(result)
    bench.begin()
    return result


def _kept(earlier: Mapping[str, Any]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Return an earlier result's rows and runs by situation, where they were as they are here."""
    here, named = conditions(), ("device", "torch", "transformers")
    runs = {
        name: run
        for name, run in earlier["runs"].items()
        if all(run["conditions"][key] == here[key] for key in named)
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for row in earlier["rows"]:
        if row["situation"] in rows:
            rows[row["situation"]].append(row)
    return rows, runs


@torch.inference_mode()
def _rows(bench: Bench, name: str, situation: Situation) -> Iterator[dict[str, Any]]:
    """The rows of one situation, and one that says why if it failed."""
    try:
        bench.begin()
        for row in situation(bench):
            yield {"situation": name, **row.document(bench.tolerance)}
    except Exception as error:
        yield {"situation": name, "failed": f"{type(error).__name__}: {error}"}


def summary(result: dict[str, Any]) -> str:
    """The rows as a short table, and what each situation took."""
    took = ", ".join(f"{name} {run['seconds']:.0f}" for name, run in result["runs"].items())
    return f"{table(result['rows'])}\nseconds: {took}"
