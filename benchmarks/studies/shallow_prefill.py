"""What prompts may leave out of the upper layers where decoded tokens run all of them.

SPEED (arXiv 2605.06105) trains models for prompts that only the lower layers read; here nothing is
trained. Upper layers either see sinks and a window of a prompt, or keep their K/V up to date and
do no more (POP, arXiv 2602.03295). The last token of a prompt runs as decoded ones do. Of each
window of text the first half is a prompt, and the second half is decoded after it, read at once as
drafts are. Promised are the operations of prompts of an 8B Llama with as large a part of its layers
left shallow, without the last token's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaskip_fx.evaluation.task import Task
from adaskip_fx.evaluation.tasks import Passkey
from adaskip_fx.plans.phase_split import prefill_only
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows

from ..floors import prefill_flop
from ..models import shape_8b
from ..tables import table
from .after_prompts import AfterPrompts, answered, logarithm
from .quality import continued
from .setup import Options, Subject, open_subject

PICTURES = ("matrix",)
PARTS = (0.25, 0.5, 0.75, 0.875)  # of the layers that prompts run in full
PROMISED = (4096, 32768)  # tokens of a prompt
Sublayers = Sequence[Sublayer]


def _windowed(sublayers: Sublayers, upper: Sublayers, window: Window) -> SkipPlan:
    windows = Windows(prefill=dict.fromkeys(_attention(upper), window))
    return replace(SkipPlan.empty(sublayers), windows=windows, last_token_full=True)


def _narrow(sublayers: Sublayers, upper: Sublayers, window: Window) -> SkipPlan:
    return SkipPlan.empty(sublayers).with_windows(Windows.of(_attention(upper), window))


def _ffn_runs(sublayers: Sublayers, upper: Sublayers, _: Window) -> SkipPlan:
    return prefill_only(SkipPlan.of(sublayers, _attention(upper)))


def _pop(sublayers: Sublayers, upper: Sublayers, _: Window) -> SkipPlan:
    return prefill_only(SkipPlan.of(sublayers, upper))


def _attention(upper: Sublayers) -> list[Sublayer]:
    return [s for s in upper if s.kind == "attention"]


#: Name -> the plan of all sublayers, those of the upper layers, and a window.
WAYS: Mapping[str, Callable[[Sublayers, Sublayers, Window], SkipPlan]] = {
    "window": _windowed,
    "window, decoding too": _narrow,
    "K/V alone, FFN run": _ffn_runs,
    "K/V alone (POP)": _pop,
}


def plan_of(way: str, sublayers: Sublayers, first: int, tokens: int) -> SkipPlan:
    """Return the plan that leaves layers from `first` on shallow, for prompts of `tokens`.

    A window has four sinks and a sixteenth of the tokens.
    """
    upper = [s for s in sublayers if s.layer >= first]
    return WAYS[way](sublayers, upper, Window(max(4, tokens // 16)))


def measure(options: Options) -> dict[str, Any]:
    """Rows of every way from several layers on, in float32 if nothing is said."""
    subject = open_subject(options)
    return {**subject.about(), **shallow_prefill(subject)}


def shallow_prefill(subject: Subject, parts: Sequence[float] = PARTS) -> dict[str, Any]:
    """Return the rows, and those of the picture."""
    sublayers, runtime = subject.runtime.sublayers, subject.runtime
    layers, large = 1 + max(s.layer for s in sublayers), shape_8b()
    firsts = {round(part * layers): part for part in parts if 0 < round(part * layers) < layers}
    keys = [(way, first) for way in WAYS for first in firsts]
    plans: dict[Hashable, SkipPlan] = {"full": SkipPlan.empty(sublayers)}
    plans |= {key: plan_of(key[0], sublayers, key[1], subject.length) for key in keys}

    def read(prompt: torch.Tensor, tokens: torch.Tensor) -> Iterator[tuple[Hashable, torch.Tensor]]:
        for key, plan in plans.items():
            yield key, continued(runtime, plan, prompt, tokens)

    found = AfterPrompts(subject, read)
    for text in subject.texts:
        for ids in subject.windows(text, "second"):
            found.go_on(text.name, ids)
        print(f"read {text.name}", file=sys.stderr, flush=True)
    for task in _tasks(subject):
        found.ask(task)
        print(f"asked {task.name}", file=sys.stderr, flush=True)
    rows = []
    for way, first in keys:
        saved = {str(n): promised(large, way, firsts[first], n) for n in PROMISED}
        about = {"way": way, "from_layer": first, "promised_saved": saved}
        rows.append({**about, **found.lost((way, first))})
    values = [[logarithm(found.kl((way, first))) for first in firsts] for way in WAYS]
    title = "decoded after a shallow prompt"
    return {
        "layers": layers,
        "context": subject.length,
        "full": found.full(),
        "rows": rows,
        "panels": [{"title": title, "rows": [*WAYS], "columns": [*firsts], "values": values}],
        "column_name": f"layers of {layers} that run in full",
        "value_name": "log10 of KL to the full model, nats a token",
    }


def promised(large: Any, way: str, part: float, tokens: int) -> float:
    """Return the share of a prompt's operations that a way saves, by the floors."""
    layers = large.config.num_hidden_layers
    sublayers = [Sublayer(n, kind) for n in range(layers) for kind in ("attention", "ffn")]  # type: ignore[arg-type]
    plan = plan_of(way, sublayers, round(part * layers), tokens)
    full = prefill_flop(large, SkipPlan.empty(sublayers), tokens)
    return 1 - prefill_flop(large, plan, tokens) / full


def _tasks(subject: Subject) -> list[Task]:
    """Return questions whose answers are read, not generated."""
    samples = 50 if subject.device.type == "cuda" else 2
    return [Passkey(samples=samples, length=subject.length, seed=1 + subject.options.seed)]


def summary(result: Mapping[str, Any]) -> str:
    """Return a table of all rows."""
    tasks, length = result["full"]["tasks"], result["context"]
    head = ["upper layers", "from layer", *(f"saved at {n:,}" for n in PROMISED)]
    head += ["KL", "perplexity", *tasks]
    cells = []
    for row in result["rows"]:
        line = [row["way"], str(row["from_layer"])]
        line += [f"{row['promised_saved'][str(n)]:.1%}" for n in PROMISED]
        line += [f"{max(row['kl'], 0.0):.4f}", f"{row['perplexity_ratio']:.4f}x"]
        cells.append([*line, *answered(row)])
    found = ", ".join(f"{task} {mean:.3f}" for task, mean in tasks.items())
    return (
        f"{length // 2} tokens decoded after prompts of as many, {result['layers']} layers; the "
        f"full model finds {found}, asked in {length} tokens; answers are differences from it\n"
        + table(head, cells, left=(0,))
    )
