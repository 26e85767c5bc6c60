"""Print what a demo found, for a terminal of 100 columns, with or without colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import get_args

from rich.console import Console
from rich.table import Table

from adaskip_fx.plans.skip_plan import Phase, SkipPlan
from adaskip_fx.plans.sublayer import Kind, Sublayer
from adaskip_fx.plans.tables import by_kind, storage

from .result import CONTENDERS, Contender, DemoResult


def show(result: DemoResult, console: Console) -> None:
    """Print all of a result."""
    for part in (_conditions, _sublayers, _plans, _times, _answers, _quality, _counts):
        part(result, console)


def _conditions(result: DemoResult, console: Console) -> None:
    c = result.conditions
    _title(console, f"AdaSkip on {c['model']}")
    _say(
        console,
        f"{c['parameters']:,} parameters, {c['dtype']}, on {c['device']} ({c['threads']} threads), "
        f"pieces compiled by {c['backend']}",
        f"torch {c['torch']}, transformers {c['transformers']}, adaskip_fx {c['adaskip_fx']}, "
        f"Python {c['python']}",
        f"alpha {c['alpha']:g}, seed {c['seed']}; calibrated on {result.profile.tokens:,} tokens "
        "of pydoc_data.topics",
    )
    width = max(map(len, result.seconds))
    for title, seconds in result.seconds.items():
        _say(console, f"  {title.ljust(width)}  {seconds:6.1f} s")


def _sublayers(result: DemoResult, console: Console) -> None:
    _title(
        console, "Similarity of the residual stream before and after each sublayer, and the plan"
    )
    similarity = dict(zip(result.profile.sublayers, result.profile.similarity(), strict=True))
    kinds = [k for k in get_args(Kind) if any(s.kind == k for s in similarity)]
    table = _table("layer", *(title for kind in kinds for title in (kind, "")))
    for layer in dict.fromkeys(s.layer for s in similarity):
        cells = []
        for kind in kinds:
            sublayer = Sublayer(layer, kind)
            known = sublayer in similarity
            cells += [f"{similarity[sublayer]:.4f}" if known else ""]
            cells += [_action(result, sublayer) if known else ""]
        table.add_row(str(layer), *cells)
    console.print(table)


def _action(result: DemoResult, sublayer: Sublayer) -> str:
    extra = result.extra(sublayer)
    if sublayer in result.plan.prefill:
        surrogate = result.plan.surrogates.get(sublayer)
        return f"skip {surrogate}" if surrogate is not None else "skip"
    return f"decode skips it in {extra} of {len(result.learned)}" if extra else ""


def _plans(result: DemoResult, console: Console) -> None:
    _title(console, "Plans")
    _say(console, f"prefill and the decode window: {_described(result.plan, 'prefill')}")
    uses = Counter(plan.digest for plan in result.learned)
    for plan in {p.digest: p for p in result.learned}.values():
        extra = [s for s in plan.skipped("decode") if s not in plan.prefill]
        _say(
            console,
            f"decode, learned in {uses[plan.digest]} of {len(result.learned)} texts: "
            f"{_described(plan, 'decode', extra)}",
        )


def _described(plan: SkipPlan, phase: Phase, extra: list[Sublayer] | None = None) -> str:
    skipped = plan.skipped(phase)
    head = f"{plan.digest[:8]} skips {len(skipped)} of {len(plan.sublayers)} sublayers"
    if extra is None:
        return f"{head}\n  {by_kind(skipped) or 'none'}"
    return f"{head}\n  added: {by_kind(extra) or 'nothing'}"


def _times(result: DemoResult, console: Console) -> None:
    c = result.conditions
    lengths = c["prompt_tokens"]
    _title(
        console,
        f"Times (medians over {len(lengths)} texts of {min(lengths):,} to {max(lengths):,} tokens, "
        f"{c['new_tokens']} decoded; warm-up apart)",
    )
    table = _table("", *CONTENDERS.values(), "speed vs as is", "vs empty plan")
    window = next(iter(result.contenders.values())).window
    table.add_row("prefill", *_compared(result, lambda x: x.prefill_seconds, "s"))
    table.add_row(
        f"decode step, window of {window}",
        *_compared(result, lambda x: x.window_step_seconds, "ms"),
    )
    table.add_row("decode step after it", *_compared(result, lambda x: x.later_step_seconds, "ms"))
    held = (storage(result.contenders[name].cache_bytes) for name in CONTENDERS)
    table.add_row("K/V storage of a request", *held)
    console.print(table)
    _say(
        console,
        "In its window the skipped model also measures its ffn sublayers; after it, the learned "
        "plan runs.",
        "Fitted: AdaSkip's choice with linear maps of the normalized stream, fitted on the "
        "calibration",
        "texts, in place of its factors; nothing is added online. Speeds are the skipped model's.",
    )


def _compared(result: DemoResult, seconds: Callable[[Contender], float], unit: str) -> list[str]:
    values = {name: seconds(contender) for name, contender in result.contenders.items()}
    factor, digits = (1, 3) if unit == "s" else (1000, 1)
    cells = [f"{values[name] * factor:.{digits}f} {unit}" for name in CONTENDERS]
    return cells + [f"{values[n] / values['skipped']:.2f}x" for n in ("as_is", "empty_plan")]


def _answers(result: DemoResult, console: Console) -> None:
    _title(console, "Pass keys: how the answers begin")
    contenders = [result.contenders[name] for name in CONTENDERS]
    table = _table("hidden at", "pass key", *CONTENDERS.values())
    for answers in zip(*(c.answers for c in contenders), strict=True):
        cells = [("+ " if a.found else "- ") + _short(a.text) for a in answers]
        table.add_row(f"{answers[0].depth:.0%}", answers[0].key, *cells)
    table.add_row("found", "", *(f"{c.found} of {len(c.answers)}" for c in contenders))
    console.print(table)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 16 else line[:13] + "..."


def _quality(result: DemoResult, console: Console) -> None:
    tokens = next(iter(result.quality.values())).tokens
    _title(console, f"Against the model as is, on {tokens:,} held-out tokens (the prefill plan)")
    table = _table("", "perplexity", "ratio", "same next token")
    for name, q in result.quality.items():
        if not table.rows:
            table.add_row(CONTENDERS["as_is"], f"{q.perplexity:.2f}", "", "")
        row = f"{q.perplexity_skipped:.2f}", f"{q.ratio:.3f}", f"{q.agreement:.3f}"
        table.add_row(CONTENDERS[name], *row)
    console.print(table)


def _counts(result: DemoResult, console: Console) -> None:
    _title(console, "What the skipped model has done, in all")
    table = _table("", "graphs captured", "pieces compiled", "programs linked", "dropped")
    for title, c in (
        ("after warm-up", result.after_warmup),
        ("after the answers", result.after_answers),
        ("at the end", result.at_end),
    ):
        table.add_row(title, *map(str, (c.captures, c.pieces, c.links, c.dropped)))
    console.print(table)
    _say(console, f"compiling pieces took {result.at_end.compile_seconds:.1f} s")
    if result.link_seconds:
        _say(
            console,
            f"linking a new plan takes {median(result.link_seconds) * 1000:.1f} ms (median of "
            f"{len(result.link_seconds)}, for which {result.pieces_for_new_plans} pieces were "
            "compiled)",
        )


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="none")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _title(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", highlight=False, markup=False)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False)
