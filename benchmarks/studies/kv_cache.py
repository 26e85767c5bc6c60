"""Windows and skipped attention together with quantized and evicted keys and values.

The third open question of AdaSkip's paper: do savings add up with those of the K/V cache, and does
quality stay? How a cache stores keys and values is simulated on the eager model (`kv_reader`). Of
each window of text the first half is a prompt, and the second half is read after it as decoded
tokens are, so that it sees what the prompt has left. Bytes are those of all keys and values that a
step reads after a prompt of the whole length. Windows come from a profile alone, or from plan files
(``--plan``). Beside each combination stands what its two parts say alone: the sum of their
divergences, the product of their shares of the bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from adaskip_fx.evaluation.task import Task
from adaskip_fx.evaluation.tasks import MultiKeyNeedle, Passkey
from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies.adaskip import skip_count

from ..floors import head_dim
from ..tables import table
from .after_prompts import AfterPrompts, Read, answered, logarithm
from .kv_reader import Reader
from .kv_storage import STORAGES, Storage
from .setup import Options, Subject, open_subject
from .window_plans import Given, attention_skipped, similar

PICTURES = ("matrix",)
SHARES = (0.4, 0.55)
FULL = "full"
Pair = tuple[str, str]  # which attention, and the name of a storage


def measure(options: Options) -> dict[str, Any]:
    """Rows of all kinds of attention with all storages, in float32 if nothing is said."""
    subject = open_subject(options)
    return {**subject.about(), **kv_cache(subject)}


def kv_cache(subject: Subject, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Return the rows, and those of the picture."""
    window = Window(max(4, subject.length // 16))
    plans = _plans(subject, window, shares)
    found = AfterPrompts(subject, _reads(subject, plans))
    for name, ids in _texts(subject):
        found.go_on(name, ids)
        print(f"read {name}", file=sys.stderr, flush=True)
    for task in _tasks(subject):
        found.ask(task)
        print(f"asked {task.name}", file=sys.stderr, flush=True)
    rows = _rows(subject, plans, found)
    return {
        "chosen_on": subject.texts[0].name,
        "window": window.to_json(),
        "context": subject.length,
        "full": found.full(),
        "rows": rows,
        "plans": [{"name": name, **plan.to_json()} for name, plan in plans.items()],
        "panels": [_panel(rows, "measured", "kl"), _panel(rows, "sum of both alone", "kl_sum")],
        "value_name": "log10 of KL to the full model, nats a token",
    }


def _plans(subject: Subject, window: Window, shares: Sequence[float]) -> dict[str, SkipPlan]:
    """Return the kinds of attention by name; the full one is the first."""
    text, empty = subject.texts[0], SkipPlan.empty(subject.runtime.sublayers)
    plans = {FULL: empty}
    for way, share, plan in Given(subject, window).plans(shares):
        plans[f"{way} {share:.0%}"] = plan
    if not subject.options.plans:
        heads = subject.runtime.graphs.structure.kv_heads
        steps = similar(subject, text, window, 1 / (1 - max(shares)))
        read = {plan: _tokens(heads, plan, subject.length) for plan in steps}
        for share in shares:
            most = (1 - share) * read[steps[0]] + 1e-6
            plans[f"windows {share:.0%}"] = next(p for p in steps if read[p] <= most)
    alpha = subject.options.alphas[0]
    skipped = skip_count(alpha, len(empty.sublayers))
    plans[f"{skipped} attention skipped"] = attention_skipped(subject.profile(text), skipped)
    return plans


def _tokens(heads: Mapping[Any, int], plan: SkipPlan, length: int) -> int:
    """Return how many tokens a step reads, in all K/V heads, with `length` stored."""
    return sum(length * full + seen * narrow for full, narrow, seen in _read(heads, plan, length))


def _read(heads: Mapping[Any, int], plan: SkipPlan, length: int) -> Iterator[tuple[int, int, int]]:
    """Return of each attention that runs its full heads, its others, and what these see."""
    for sublayer, count in heads.items():
        if plan.action("decode", sublayer) is Action.RUN:
            window = plan.windows.get("decode", sublayer)
            full = count if window is None else len(window.full_heads)
            yield full, count - full, length if window is None else window.seen(length)


def step_bytes(subject: Subject, plan: SkipPlan, storage: Storage) -> int:
    """Return the bytes of keys and values that a step reads after a prompt of the whole length."""
    dim, length = head_dim(subject.model), subject.length
    heads, held = subject.runtime.graphs.structure.kv_heads, storage.kept(length)
    return sum(
        full * storage.head_bytes(held, dim) + narrow * storage.head_bytes(seen, dim)
        for full, narrow, seen in _read(heads, plan, length)
    )


def _texts(subject: Subject) -> Iterator[tuple[str, torch.Tensor]]:
    """Return windows of second halves, of texts that nothing was chosen on where there are some."""
    for text in subject.texts[1:] or subject.texts:
        for ids in subject.windows(text, "second"):
            yield text.name, ids


def _tasks(subject: Subject) -> list[Task]:
    """Return questions whose answers are read, not generated."""
    size: dict[str, Any] = {
        "samples": 50 if subject.device.type == "cuda" else 2,
        "length": subject.length,
        "seed": 1 + subject.options.seed,
        "forced": True,
    }
    return [Passkey(**size), MultiKeyNeedle(**size)]


def _reads(subject: Subject, plans: Mapping[str, SkipPlan]) -> Read:
    """Return what reads after a prompt, with every kind of attention and every storage."""

    def read(prompt: torch.Tensor, tokens: torch.Tensor) -> Iterator[tuple[Pair, torch.Tensor]]:
        for name, plan in plans.items():
            with Reader(subject, plan).after(prompt) as reader:
                if name == FULL:
                    yield (FULL, "as they are"), reader.logits(tokens, None)
                for storage in STORAGES:
                    yield (name, storage.name), reader.logits(tokens, storage)

    return read


def _rows(
    subject: Subject, plans: Mapping[str, SkipPlan], found: AfterPrompts
) -> list[dict[str, Any]]:
    """Return all rows; of combinations with what their parts say alone."""
    pairs = [(name, storage) for name in plans for storage in STORAGES]
    read = {(name, s.name): step_bytes(subject, plans[name], s) for name, s in pairs}
    plain, rows = STORAGES[0].name, list[dict[str, Any]]()
    share = {pair: count / read[FULL, plain] for pair, count in read.items()}
    for pair, count in read.items():
        attention, storage = pair
        row = {"attention": attention, "storage": storage, "bytes": count, "share": share[pair]}
        if attention != FULL and plain != storage:
            alone = (attention, plain), (FULL, storage)
            row["kl_sum"] = sum(found.kl(part) for part in alone)
            row["share_product"] = math.prod(share[part] for part in alone)
        rows.append({**row, **found.lost(pair)})
    return rows


def _panel(rows: Sequence[Mapping[str, Any]], title: str, key: str) -> dict[str, Any]:
    """Return a matrix of attention and storages, of logarithms; None where a row does not say."""
    attention = list(dict.fromkeys(row["attention"] for row in rows))
    known = {(row["attention"], row["storage"]): row.get(key) for row in rows}
    columns = [storage.name for storage in STORAGES]

    values = [[logarithm(known[a, storage]) for storage in columns] for a in attention]
    return {"title": title, "rows": attention, "columns": columns, "values": values}


def summary(result: Mapping[str, Any]) -> str:
    """Return a table of all rows."""
    window, tasks = result["window"], [*result["full"]["tasks"]]
    head = ["attention", "K/V stored", "K/V read", "product", "KL", "sum", "perplexity", *tasks]
    cells = []
    for row in result["rows"]:
        alone = (row.get("share_product"), "{:.1%}"), (row.get("kl_sum"), "{:.4f}")
        product, added = ("-" if v is None else text.format(v) for v, text in alone)
        line = [row["attention"], row["storage"], f"{row['share']:.1%}", product]
        line += [f"{max(row['kl'], 0.0):.4f}", added, f"{row['perplexity_ratio']:.4f}x"]
        cells.append([*line, *answered(row)])
    found = ", ".join(f"{task} {mean:.3f}" for task, mean in result["full"]["tasks"].items())
    return (
        f"windows of {window['sinks']}+{window['tokens']} at {result['context']} tokens, chosen on "
        f"{result['chosen_on']}; the full model finds {found}; answers are differences from it\n"
        + table(head, cells, left=(0, 1))
    )
