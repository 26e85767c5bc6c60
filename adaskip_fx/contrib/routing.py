"""Learn the routes of a `Router`: a profile and a centroid for each set of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..calibration.calibrate import calibrate, unmasked
from ..policies.router import Route
from ..runtime.prompts import mean_embedding


def learn_routes(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    max_length: int = 2048,
    *,
    backend: str = "eager",
) -> tuple[Route, ...]:
    """A route for each named set of texts, which stand for a kind of prompts.

    Args:
        model, tokenizer, max_length, backend: as of :func:`adaskip_fx.calibrate`.
        texts: by name; a set's centroid is the mean of its texts' mean input embeddings.

    Raises:
        ValueError: no sets; and as of `calibrate`.
    """
    if not texts:
        raise ValueError("no texts were given; name a set of texts for each kind of prompts")
    return tuple(
        Route(
            name,
            calibrate(model, tokenizer, of_kind, max_length, backend=backend),
            tuple(_centroid(model, tokenizer, of_kind, max_length).tolist()),
        )
        for name, of_kind in texts.items()
    )


def _centroid(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> torch.Tensor:
    given = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
    ids = (unmasked(tokenizer(text, **given)).to(model.device) for text in texts)
    return torch.stack([mean_embedding(model, one) for one in ids]).mean(0)
