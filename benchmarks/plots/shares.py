"""What plans lose against the keys and values that they leave unread, by how they were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .source import Document, items, place
from .style import look, plain

HOW = (
    "a picture of shares is drawn from 'rows' with way, share, texts (kl by name) and tasks (mean "
    "by name), as `python -m benchmarks run study_windows` writes them"
)
_ASKED = "passkey"
_BAND = 1.96  # standard errors, on each side


def figure(documents: Sequence[Document], make: Any) -> Any:
    """Two panels: divergence from the full model, and the answers kept. PlotError for other data.

    A way is one line in each; its divergence is the mean over the texts.
    """
    rows = items(documents, "rows", ("way", "share", "texts", "tasks"), HOW)
    drawn = make(figsize=(9, 3.8), layout="constrained")
    losses, answers = drawn.subplots(1, 2)
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        mine = sorted((row for row in rows if row["way"] == way), key=lambda row: row["share"])
        shares = [100 * row["share"] for row in mine]
        losses.plot(shares, [divergence(row) for row in mine], label=way, **look(number))
        asked = [row["tasks"][_ASKED] for row in mine]
        spread = [_BAND * score["standard_error"] for score in asked]
        kept = [score["mean"] for score in asked]
        answers.errorbar(shares, kept, spread, label=way, capsize=2, **look(number))
    if "full" in documents[0]:
        full = documents[0]["full"]["tasks"][_ASKED]["mean"]
        answers.axhline(full, color="#666666", linestyle=":", label="full model")
    losses.set_yscale("log")
    losses.set_ylabel("KL to the full model, nats a token")
    answers.set_ylabel("passkeys answered (paired 95% interval)")
    for axes in (losses, answers):
        axes.set_xlabel("keys and values that a step does not read, %")
        plain(axes)
    handles, labels = answers.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right center", frameon=False)
    drawn.suptitle(place(documents) or None, fontsize=10)
    return drawn


def divergence(row: Document) -> float:
    """The mean over texts of KL, in nats a token; NaN where a plan has none."""
    values = [float(cost["kl"]) for cost in row["texts"].values()]
    return sum(values) / len(values)
