"""Print an evaluation, for a terminal of 100 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .execution_check import PhaseRan
from .result import Evaluation, Scores, TaskResult


def show(found: Evaluation, console: Console) -> None:
    """Print a table of the tasks, and of perplexities by position."""
    table = _table("task", "n", "score", "", "model as is", "KL", "skipped: prefill", "decode")
    for result in found.results:
        table.add_row(*_row(result))
    console.print(table)
    for result in found.results:
        if len(result.buckets) > 1:
            console.print(f"\n{result.title}, by position", highlight=False, markup=False)
            console.print(_positions(result))


def _row(result: TaskResult) -> tuple[str, ...]:
    phases = (None, None) if result.ran is None else (result.ran.prefill, result.ran.decode)
    return (
        result.title,
        str(len(result.scores.values)),
        _score(result.scores),
        result.metric,
        "" if result.reference is None else _score(result.reference),
        _number(result.kl),
        *map(_fraction, phases),
    )


def _score(scores: Scores) -> str:
    error = "" if scores.error is None else f" \N{PLUS-MINUS SIGN} {_digits(scores.error)}"
    return f"{_digits(scores.mean)}{error}"


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _fraction(phase: PhaseRan | None) -> str:
    return "" if phase is None else _number(phase.fraction)


def _positions(result: TaskResult) -> Table:
    compared = result.kl is not None
    more = ("model as is", "KL", "same token") if compared else ()
    table = _table("positions", "tokens", "perplexity", *more)
    for bucket in result.buckets:
        shown = bucket.to_json()
        last = "" if bucket.last is None else f"{bucket.last - 1:,}"
        keys = ("perplexity", "reference_perplexity", "kl", "agreement")
        values = (shown[key] for key in keys[: 4 if compared else 1])
        cells = (_digits(v) for v in values if isinstance(v, float))
        table.add_row(f"{bucket.first:,}-{last}", f"{bucket.tokens:,}", *cells)
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    for title in titles:
        table.add_column(title)
    return table
