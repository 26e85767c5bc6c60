"""The results as Markdown tables; needs neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import table

#: the results that a report is made of
NAMES = (
    "speed",
    "speed_batch8",
    "peers",
    "peers_whole_graph",
    "generate",
    "plans",
    "window",
    "cold",
    "budget",
    "situations",
    "windows",
)
SPEED_HEAD = (
    *("context", "skipped"),
    *("prefill s", "over floor", "speed-up", "promise", "kept"),
    *("decode ms", "over floor", "speed-up", "promise", "kept"),
    *("K/V GiB", "share"),
)
BUDGET_HEAD = ("phase", "context", "plan", "attention", "ffn", "predicted", "measured", "error")
SITUATIONS_HEAD = (
    *("situation", "what", "measured", "reference", "unit"),
    *("ratio", "compared", "target", "met"),
)
WINDOWS_HEAD = (
    "context",
    "plan",
    "prefill s",
    "speed-up",
    "saved",
    "decode ms",
    "speed-up",
    "saved",
)
PEERS_HEAD = ("context", "peer", "prefill s", "decode ms", "decode against adaskip")

Document = dict[str, Any]


class ReportError(Exception):
    """There is nothing to report, or a file is not a result."""


def load(folder: Path) -> dict[str, Document]:
    """The results in `folder`, by name; those that were not measured are left out.

    Raises:
        ReportError: a file cannot be read, or there is none.
    """
    documents = {}
    for name in NAMES:
        path = folder / f"{name}.json"
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be read: {error}") from None
        if not isinstance(document, dict) or document.get("workload") != name:
            raise ReportError(f"{path} is not a result of `python -m benchmarks run {name}`")
        documents[name] = document
    if not documents:
        raise ReportError(
            f"no results in {folder}: `python -m benchmarks run {NAMES[0]}` writes some"
        )
    return documents


def tables(documents: dict[str, Document]) -> str:
    """All tables.

    Raises:
        ReportError: a result lacks what its table shows.
    """
    parts = []
    figures: dict[str, list[tuple[str, str]]] = {}  # by conditions
    for name, document in documents.items():
        try:
            where = _where(document)
            if name in ("speed", "speed_batch8"):
                parts.append(_speed(document, where))
            elif name == "budget":
                parts.append(_budget(document, where))
            elif name == "situations":
                parts.append(_situations(document, where))
            elif name == "windows":
                parts.append(_windows(document, where))
            elif name in ("peers", "peers_whole_graph"):
                rows = _peer_rows(document["rows"])
                title = "Peers" if name == "peers" else "Peers, in another run"
                parts.append(f"## {title}\n\n{where}\n\n{table(PEERS_HEAD, rows, left=(1,))}")
            else:
                figures.setdefault(where, []).extend(_FIGURES[name](document))
        except (KeyError, TypeError) as error:
            raise ReportError(f"{name}.json is not complete: {error!r}") from None
    for where, pairs in figures.items():
        rows = table(("figure", "value"), pairs, left=(0,))
        parts.append(f"## Single figures\n\n{where}\n\n{rows}")
    return "\n\n".join(parts)


def _where(document: Document) -> str:
    at = document["conditions"]
    return (
        f"{at['device']}, {at['threads']} threads on {at['cores']} cores, Python {at['python']}, "
        f"torch {at['torch']}, transformers {at['transformers']}"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _speed(document: Document, where: str) -> str:
    model, top = document["model"], document["ceilings"]
    rows = []
    for row in document["rows"]:
        cells = [str(row["context"]), str(row["skipped"])]
        for phase, scale, digits in (("prefill", 1, 4), ("decode", 1000, 3)):
            cells += [
                _number(scale * row[phase]["median"], digits),
                _number(row[f"{phase}_over_floor"]),
                *(_number(row.get(f"{phase}_{k}")) for k in ("speedup", "promise")),
                _number(row.get(f"{phase}_kept_of_promise")),
            ]
        rows.append([*cells, _number(row["kv_bytes"] / 2**30), _number(row["kv_share"])])
    return (
        f"## Speed, batch {document['batch']}\n\n{where}; {model['layers']} layers, "
        f"hidden size {model['hidden']}, {document['dtype']}; measured ceilings "
        f"{top['copy_bytes_per_s'] / 1e9:.4g} GB/s and "
        f"{top['matrix_flop_per_s'] / 1e12:.4g} TFLOP/s\n\n{table(SPEED_HEAD, rows)}"
    )


def _budget(document: Document, where: str) -> str:
    model = document["model"]
    rows = [
        [
            *(row["phase"], str(row["context"]), row["plan"]),
            *(str(row["attention"]), str(row["ffn"])),
            *(_number(row["predicted"]), _number(row["measured"]), f"{row['error']:+.1%}"),
        ]
        for row in document["rows"]
    ]
    return (
        f"## Speed-up, predicted and measured\n\n{where}; {model['layers']} layers, "
        f"hidden size {model['hidden']}, {document['dtype']}; the prediction is off by at most "
        f"{document['worst']:.1%}\n\n{table(BUDGET_HEAD, rows, left=(0, 2))}"
    )


def _situations(document: Document, where: str) -> str:
    model, rows = document["model"], []
    for row in document["rows"]:
        if "failed" in row:
            said = row["failed"].replace("|", "/").split("\n")[0]
            rows.append([row["situation"], f"failed: {said}", *["-"] * 7])
            continue
        target = _number(row["target"], 2)
        rows.append(
            [
                *(row["situation"], row["what"]),
                *(_number(row["measured"]), _number(row["reference"]), row["unit"]),
                *(_number(row["ratio"]), _number(row["value"])),
                *(f"{'>= ' if row['at_least'] else ''}{target}", _MET[row["met"]]),
            ]
        )
    return (
        f"## Situations\n\n{where}; {model['layers']} layers, hidden size {model['hidden']}, "
        f"{document['dtype']}\n\n{table(SITUATIONS_HEAD, rows, left=(0, 1, 4, 8))}"
    )


def _windows(document: Document, where: str) -> str:
    rows = []
    for row in document["rows"]:
        cells = [str(row["context"]), row["plan"]]
        for phase, scale, digits in (("prefill", 1, 4), ("decode", 1000, 3)):
            ratios = (row.get(f"{phase}_{what}") for what in ("speedup", "saved"))
            cells += [_number(scale * row[phase], digits), *map(_number, ratios)]
        rows.append(cells)
    return (
        f"## Windows of {document['window']} tokens\n\n{where}; saved is of what the floors promise"
        f"\n\n{table(WINDOWS_HEAD, rows, left=(1,))}"
    )


_MET = {None: "-", True: "yes", False: "no"}


def _peer_rows(rows: Sequence[Document]) -> list[list[str]]:
    ours = {r["context"]: r["decode"]["median"] for r in rows if r["peer"] == "adaskip"}
    cells = []
    for row in rows:
        decode, own = row["decode"]["median"], ours.get(row["context"])
        prefill = row["prefill"]["median"] if "prefill" in row else None
        ratio = "-" if own is None else f"{decode / own:.2f}"
        cells.append(
            [
                str(row["context"]),
                row["peer"],
                _number(prefill, 4),
                _number(1000 * decode),
                ratio,
            ]
        )
    return cells


def _generate(document: Document) -> list[tuple[str, str]]:
    return [
        (
            f"generate, {kind}: share of the step rate (context {document['context']})",
            _number(document[kind]["of_step_rate"]),
        )
        for kind in ("greedy", "sampling")
    ]


def _plans(document: Document) -> list[tuple[str, str]]:
    step, new = document["step_ms"]["median"], document["step_with_new_plan_ms"]
    return [
        *(
            (
                f"pause for a new plan, {which} of {new['repeats']}, ms",
                _number(new[which] - step, 1),
            )
            for which in ("median", "max")
        ),
        ("memory per plan, MiB", _number(document["memory_per_plan_bytes"] / 2**20, 2)),
    ]


def _window(document: Document) -> list[tuple[str, str]]:
    return [
        (
            f"step with {document['probed']} probes over a step without",
            _number(document["probed_over_plain"]),
        ),
        (
            f"calibration over plain prompts (16 of {document['prompt']} tokens)",
            _number(document["calibration_over_prompts"]),
        ),
    ]


_CACHES = {"none": "no", "warm": "warm"}


def _cold(document: Document) -> list[tuple[str, str]]:
    return [
        (
            f"cold start, {row['layers']} layers, {_CACHES[row['cache']]} compile cache, s "
            f"(capture; to the first prompt; and two tokens)",
            "; ".join(_number(row[k], 1) for k in ("capture_s", "prompt_s", "total_s")),
        )
        for row in document["rows"]
    ]


_FIGURES = {"generate": _generate, "plans": _plans, "window": _window, "cold": _cold}
