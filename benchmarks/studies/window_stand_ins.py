"""What windows lose, and how much of it maps give back that stand in for what they hide.

A map is fitted for each sublayer with a window (`stand_ins`), in order, on the first halves of two
texts and on as many questions about what is hidden in them, and may be distilled after that. It is
read on other texts, and asked, as in study_windows, in eager transformers. Plans are files that a
search has left (``--plan``), those in ``results/window_plans`` if none are given; ``--surrogate``
names the stand-ins. Rows of other plans and stand-ins that an earlier run has left stay.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adaskip_fx.fitting.retrieval_prompts import retrieval_samples
from adaskip_fx.fitting.weighted_sample import Sample
from adaskip_fx.plans.windows import Window

from ..tables import table
from .setup import Options, Subject, Text, open_subject
from .stand_in_judge import Judge, against
from .stand_in_training import STEPS, refine
from .stand_ins import Kind
from .window_plans import Given
from .windowed_model import WindowedModel

PICTURES = ("shares",)
NOTHING = "nothing"  # stands in
STAND_INS = (
    *(NOTHING, "constant", "input 8", "input 32", "input 64", "output 32"),
    *("input 32 refined", "output 32 refined"),
)
_PLANS = Path(__file__).parent.parent / "results" / "window_plans"
_JUDGED = {
    "layers": ("layers_forward_0.4", "layers_forward_0.55", "layers_forward_0.7"),
    "heads": ("heads_forward_0.55", "heads_forward_0.7"),
}
_FITTED = 4  # windows of a half, for one that is read
_SAME = ("model", "texts", "windows", "seed", "calibrated_on", "fitted_on")


def measure(options: Options) -> dict[str, Any]:
    """Rows of every plan with every stand-in, in float32 if nothing is said."""
    if not options.plans:
        files = [(way, _PLANS / f"{name}.json") for way in _JUDGED for name in _JUDGED[way]]
        options = replace(options, plans=tuple(files))
    return window_stand_ins(open_subject(options))


def window_stand_ins(subject: Subject) -> dict[str, Any]:
    """Return the rows, saved one by one, with those that an earlier run has left."""
    names = subject.options.surrogates or STAND_INS
    kinds = {name: None if name == NOTHING else Kind.parse(name) for name in names}
    known = [t for t in subject.texts if t.name in subject.calibrated]
    plans = [*Given(subject, Window(max(4, subject.length // 16))).plans(())]
    judge, fit = Judge(subject, known), _Fit(subject, known)
    result = {
        **subject.about(),
        "calibrated_on": [t.name for t in known],
        "fitted_on": {"texts": len(fit.texts), "questions": len(fit.questions)},
        "context": subject.length,
        "full": judge.full,
    }
    earlier, rows = _earlier(subject, result), dict[tuple[str, float, str], dict[str, Any]]()
    for way, share, plan in plans:
        for name, kind in kinds.items():
            model = WindowedModel(subject, plan)
            with model.running():
                said = {} if kind is None else fit(model, kind)
                row = {"way": f"{way}, {name}", "plan": way, "share": share, "stand_in": name}
                rows[way, share, name] = {**row, **said, **judge(model)}
            print(_line(rows[way, share, name]), file=sys.stderr, flush=True)
            result["rows"] = _ordered({**earlier, **rows})
            subject.options.save(result)
    return result


class _Fit:
    """Fits the stand-ins of running models.

    Attributes:
        texts, questions: What they are fitted on; answers have half of a question's weight when
            stand-ins are refined.
    """

    def __init__(self, subject: Subject, known: Sequence[Text]) -> None:
        self._steps = subject.options.steps[0] if subject.options.steps else STEPS
        count, length = _FITTED * subject.samples, subject.length
        halves = [ids for text in known for ids in text.windows("first", count, length)]
        self.texts = [Sample(ids.to(subject.device)) for ids in halves]
        ids = [sample.ids for sample in self.texts]
        seed = subject.options.seed
        self.questions = retrieval_samples(subject.tokenizer, ids, len(ids), length, seed=seed)
        self._ids = torch.cat([sample.ids for sample in (*self.texts, *self.questions)])

    def __call__(self, model: WindowedModel, kind: Kind) -> dict[str, Any]:
        """Fit, and return what is said of it in a row."""
        start = time.perf_counter()
        model.fit(self._ids, kind)
        explained = {str(sublayer): share for sublayer, share in model.explained.items()}
        losses = refine(model, (self.texts, self.questions), self._steps) if kind.refined else {}
        took = time.perf_counter() - start
        return {"explained": explained, "kl_by_step": losses, "seconds": took}


def _earlier(subject: Subject, result: Mapping[str, Any]) -> dict[tuple[str, float, str], Any]:
    """Return the rows that an earlier run has left, if it was of the same model and texts."""
    left = subject.options.earlier()
    if left is None:
        return {}
    other = [name for name in _SAME if left.get(name) != result[name]]
    if other:
        print(f"earlier rows are left out: they have another {other[0]!r}", file=sys.stderr)
        return {}
    return {(row["plan"], row["share"], row["stand_in"]): row for row in left["rows"]}


def _ordered(rows: Mapping[tuple[str, float, str], Any]) -> list[dict[str, Any]]:
    """Return rows by plan, in the order of its first row, and by share."""
    plans = [*dict.fromkeys(plan for plan, _, _ in rows)]
    return [rows[key] for key in sorted(rows, key=lambda key: (plans.index(key[0]), key[1]))]


def _line(row: Mapping[str, Any]) -> str:
    cells = [f"{row['way']:28s} {row['share']:.2f}"]
    cells += [f"{n} x{t['perplexity_ratio']:.4f} KL {t['kl']:.4f}" for n, t in row["texts"].items()]
    cells += [f"{task} {score['mean']:.3f}" for task, score in row["tasks"].items()]
    return "  ".join([*cells, f"{row.get('seconds', 0.0):.0f} s"])


def summary(result: Mapping[str, Any]) -> str:
    """Return a table of all rows, and how each differs from its windows alone."""
    tasks, rows = result["full"]["tasks"], result["rows"]
    texts = [*result["full"]["texts"]]
    head = ["plan", "share", "stands in", "given back"]
    head += [f"{what}, {text}" for text in texts for what in ("perplexity", "KL")]
    head += [*tasks, "KL saved", *(f"{task} gained" for task in tasks)]
    alone = {(r["plan"], r["share"]): r for r in rows if r["stand_in"] == NOTHING}
    cells = []
    for row in rows:
        shares = sorted(row.get("explained", {}).values())
        line = [row["plan"], f"{row['share']:.0%}", row["stand_in"]]
        line += [f"{shares[len(shares) // 2]:.1%}" if shares else "-"]
        for cost in row["texts"].values():
            line += [f"{cost['perplexity_ratio']:.4f}x", _with_error(cost["kl"], cost["kl_error"])]
        line += [f"{score['mean']:.3f}" for score in row["tasks"].values()]
        other = alone.get((row["plan"], row["share"]))
        gains = against(row, other) if other and other is not row else {}
        kl = gains.get("kl")
        line += [_with_error(-kl[0], kl[1], sign="+") if kl else "-"]
        line += [_with_error(*gains[t], sign="+") if gains else "-" for t in tasks]
        cells.append(line)
    found = ", ".join(f"{task} {score['mean']:.3f}" for task, score in tasks.items())
    return (
        f"windows at {result['context']} tokens, stand-ins fitted on "
        f"{', '.join(result['calibrated_on'])}; the full model finds {found}; given back is the "
        "median over sublayers, where fitted\n" + table(head, cells, left=(0, 2))
    )


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
