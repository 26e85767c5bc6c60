"""Is attention really more like its input than FFN, and more concentrated? (The first figure.)"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies.adaskip import skip_count

from .setup import Options, Subject, Text, open_subject
from .stats import above, described, rank_correlation
from .streams import cosines, prompt_streams

PICTURES = ("similarity",)
Array = npt.NDArray[np.float64]


def measure(options: Options) -> dict[str, Any]:
    """Similarity of every sublayer on every text; what it says of the kinds."""
    subject = open_subject(options)
    return {**subject.about(), **similarity(subject)}


def similarity(subject: Subject) -> dict[str, Any]:
    """Rows as the picture takes them, and each text's figures by kind."""
    rows = [_row(subject, text) for text in subject.texts]
    pairs = [
        {
            "texts": [a["name"], b["name"]],
            "rank_correlation": rank_correlation(a["mean"], b["mean"]),
        }
        for a, b in combinations(rows, 2)
    ]
    return {"rows": rows, "between_texts": pairs}


def _row(subject: Subject, text: Text) -> dict[str, Any]:
    names = [str(s) for s in subject.runtime.sublayers]
    values = token_similarity(subject, subject.windows(text, "first"))
    low, high = np.quantile(values, (0.1, 0.9), axis=1)
    mean = values.mean(1)
    return {
        "name": text.name,
        "sublayers": names,
        "mean": mean.tolist(),
        "std": values.std(1).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "tokens": values.shape[1],
        **by_kind(names, mean, values.std(1), subject.options.alphas),
    }


def token_similarity(subject: Subject, windows: Sequence[torch.Tensor]) -> Array:
    """[sublayers, tokens] cosine of the full model's stream before and after each sublayer."""
    empty = SkipPlan.empty(subject.runtime.sublayers)
    parts = []
    for ids in windows:
        _, streams = prompt_streams(subject.runtime, empty, ids, keep=1)
        found = torch.stack([cosines(a, b) for a, b in pairwise(streams)])
        parts.append(found.double().cpu().numpy())
    return np.concatenate(parts, axis=1)


def by_kind(
    names: Sequence[str], mean: Array, std: Array, alphas: Sequence[float]
) -> dict[str, Any]:
    """For each kind the spread over its sublayers; how the kinds compare.

    ``attention_above_ffn``: how often an attention sublayer is more like its input than an FFN.
    ``skipped``: for each alpha, of the most similar sublayers how many are of each kind.
    """
    kinds = np.array([name.split(".")[1] for name in names])
    found: dict[str, Any] = {
        "kinds": {
            kind: {
                "over_sublayers": described(mean[kinds == kind]),
                "std_over_tokens": float(std[kinds == kind].mean()),
            }
            for kind in sorted(set(kinds.tolist()))
        }
    }
    if {"attention", "ffn"} <= set(kinds.tolist()):
        found["attention_above_ffn"] = above(mean[kinds == "attention"], mean[kinds == "ffn"])
    ranking = kinds[np.argsort(-mean, kind="stable")].tolist()
    found["skipped"] = []
    for alpha in alphas:
        top = ranking[: skip_count(alpha, len(names))]
        counted = {kind: top.count(kind) for kind in sorted(set(ranking))}
        found["skipped"].append({"alpha": alpha, **counted})
    return found


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    lines = []
    for row in result["rows"]:
        lines.append(f"{row['name']}: {row['tokens']} tokens")
        for kind, figures in row["kinds"].items():
            over = figures["over_sublayers"]
            lines.append(
                f"  {kind}: mean {over['mean']:.4f}, of sublayers {over['min']:.4f} to "
                f"{over['max']:.4f} (std {over['std']:.4f}), std over tokens "
                f"{figures['std_over_tokens']:.4f}"
            )
        if "attention_above_ffn" in row:
            lines.append(f"  attention above ffn: {row['attention_above_ffn']:.3f} of the pairs")
    return "\n".join(lines)
