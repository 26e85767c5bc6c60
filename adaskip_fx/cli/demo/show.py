"""Print what a demo found, for a terminal of 100 columns, with or without colour."""

from __future__ import annotations

from statistics import median
from typing import get_args

from rich.console import Console

from ...evaluation.result import TaskResult
from ...plans.sublayer import Kind, Sublayer
from ...plans.tables import by_kind
from ..bench import show_times
from ..reporting import plain_table
from .run import DemoResult


def show(result: DemoResult, console: Console) -> None:
    """Print all of a result."""
    for part in (_conditions, _sublayers, _plans, _times, _answers, _quality, _counts):
        part(result, console)


def _conditions(result: DemoResult, console: Console) -> None:
    c = result.conditions
    device = c["processor"] if c["device"].startswith("CPU") else c["device"]
    _title(console, f"AdaSkip on {c['name']}")
    _print(
        console,
        f"{c['parameters']:,} parameters, {c['dtype']}, on {device} ({c['threads']} threads), "
        f"pieces compiled by {c['backend']}",
        f"torch {c['torch']}, transformers {c['transformers']}, adaskip_fx {c['adaskip_fx']}, "
        f"Python {c['python']}",
        f"alpha {c['alpha']:g}, seed {c['seed']}; calibrated on {result.profile.tokens:,} tokens "
        "of pydoc_data.topics",
    )


def _sublayers(result: DemoResult, console: Console) -> None:
    _title(
        console, "Similarity of the residual stream before and after each sublayer, and the plan"
    )
    similarity = dict(zip(result.profile.sublayers, result.profile.similarity(), strict=True))
    kinds = [k for k in get_args(Kind) if any(s.kind == k for s in similarity)]
    table = plain_table("layer", *(title for kind in kinds for title in (kind, "")))
    for layer in dict.fromkeys(s.layer for s in similarity):
        cells = []
        for sublayer in (Sublayer(layer, kind) for kind in kinds):
            known = sublayer in similarity
            cells += [f"{similarity[sublayer]:.4f}" if known else "", _action(result, sublayer)]
        table.add_row(str(layer), *cells)
    console.print(table)


def _action(result: DemoResult, sublayer: Sublayer) -> str:
    if sublayer not in result.plan.prefill:
        return "decode may skip it" if any(sublayer in p.decode for p in result.learned) else ""
    return f"skip {result.plan.surrogates.get(sublayer) or ''}".rstrip()


def _plans(result: DemoResult, console: Console) -> None:
    plan, total = result.plan, len(result.plan.sublayers)
    skipped = plan.skipped("prefill")
    _title(console, "Plans")
    _print(
        console,
        f"prompts and the decode window: {plan.digest[:8]} skips {len(skipped)} of {total} "
        "sublayers",
        f"  {by_kind(skipped) or 'none'}",
    )
    for learned in result.learned:
        extra = [s for s in learned.skipped("decode") if s not in plan.prefill]
        _print(console, f"learned while decoding: {learned.digest[:8]} also skips {by_kind(extra)}")


def _times(result: DemoResult, console: Console) -> None:
    c = result.conditions
    _title(console, f"Times (medians of {c['rounds']} rounds, without compiling or linking)")
    show_times(result.times, console)
    _print(
        console,
        "Fitted: AdaSkip's choice with linear maps of the normalized stream, fitted on the "
        "calibration",
        "texts, in place of its factors; nothing is added while decoding.",
    )


def _answers(result: DemoResult, console: Console) -> None:
    _title(console, "Pass keys: how the answers begin")
    asked = {name: found["passkey"] for name, found in result.results.items()}
    table = plain_table("hidden at", "pass key", *(name.replace("_", " ") for name in asked))
    for i, passkey in enumerate(result.passkeys):
        cells = [
            ("+ " if a.scores.values[i] else "- ") + _short(a.answers[i]) for a in asked.values()
        ]
        table.add_row(f"{passkey.depth:.0%}", passkey.key, *cells)
    found = (f"{sum(a.scores.values):.0f} of {len(a.answers)}" for a in asked.values())
    table.add_row("found", "", *found)
    console.print(table)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 16 else line[:13] + "..."


def _quality(result: DemoResult, console: Console) -> None:
    judged = {n: found["perplexity"] for n, found in result.results.items() if n != "as_is"}
    tokens = next(iter(judged.values())).buckets[0].tokens
    _title(console, f"Against the model as is, on {tokens:,} held-out tokens")
    table = plain_table("", "perplexity", "ratio", "same next token")
    for name, task in judged.items():
        assert task.reference is not None
        if not table.rows:
            table.add_row("as is", f"{task.reference.mean:.2f}", "", "")
        ratio = task.scores.mean / task.reference.mean
        table.add_row(name, f"{task.scores.mean:.2f}", f"{ratio:.3f}", f"{_agreement(task):.3f}")
    console.print(table)


def _agreement(task: TaskResult) -> float:
    return sum(b.agreed or 0 for b in task.buckets) / sum(b.tokens for b in task.buckets)


def _counts(result: DemoResult, console: Console) -> None:
    counts = result.counts
    _title(console, "What the skipped model has done, in all")
    _print(
        console,
        f"{counts['captures']} graphs captured, {counts['pieces']} pieces compiled, "
        f"{counts['links']} programs linked",
    )
    if result.link_seconds:
        _print(
            console,
            f"linking a new plan takes {median(result.link_seconds) * 1000:.1f} ms (median of "
            f"{len(result.link_seconds)}, for which {result.pieces_for_new_plans} pieces were "
            "compiled)",
        )


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", highlight=False, markup=False)


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)
