"""How well a model predicts windows of text, by position, and how far from a reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from adaskip_fx.utils.files import JSON
from adaskip_fx.utils.token_losses import (
    agreement,
    kl_divergence,
    negative_log_likelihood,
    perplexity,
)


@dataclass(frozen=True)
class Bucket:
    """Sums over the predicted tokens at positions `first` to before `last`.

    Attributes:
        first, last: positions; `last` None for no end.
        tokens: how many were predicted.
        nll: negative log-likelihood, nats.
        reference_nll: that of the reference model.
        kl: Kullback-Leibler divergence of the model's predictions from the reference's, nats.
        agreed: how often both find the same token the likeliest.
    """

    first: int
    last: int | None
    tokens: int = 0
    nll: float = 0.0
    reference_nll: float | None = None
    kl: float | None = None
    agreed: int | None = None

    def __add__(self, other: Bucket) -> Bucket:
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            nll=self.nll + other.nll,
            reference_nll=_sum(self.reference_nll, other.reference_nll),
            kl=_sum(self.kl, other.kl),
            agreed=None
            if self.agreed is None or other.agreed is None
            else self.agreed + other.agreed,
        )

    def to_json(self) -> dict[str, JSON]:
        """Return means over the tokens, and perplexities."""
        n = self.tokens
        shown: dict[str, JSON] = {
            "first": self.first,
            "last": self.last,
            "tokens": n,
            "perplexity": perplexity(self.nll, n),
        }
        if self.reference_nll is not None and self.kl is not None and self.agreed is not None:
            shown["reference_perplexity"] = perplexity(self.reference_nll, n)
            shown["kl"] = self.kl / n
            shown["agreement"] = self.agreed / n
        return shown


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def by_position(
    tokens: Sequence[int],
    logits: torch.Tensor,
    others: torch.Tensor | None,
    edges: Sequence[int],
) -> list[Bucket]:
    """Return one window's sums, for each bucket that has predicted tokens in it.

    Args:
        tokens: the window; the first token is predicted by nothing.
        logits: the model's logits that predict the others, [tokens - 1, V].
        others: those of the reference model; None for none.
        edges: where buckets end; the last one has no end.
    """
    ids = torch.tensor(tokens, device=logits.device)
    found = []
    for first, last in pairwise([0, *edges, None]):
        assert first is not None
        begin, end = max(first, 1), len(ids) if last is None else min(last, len(ids))
        if begin >= end:
            continue
        rows, right = logits[begin - 1 : end - 1], ids[begin:end]
        bucket = Bucket(first, last, len(right), negative_log_likelihood(rows, right))
        if others is not None:
            theirs = others[begin - 1 : end - 1].to(logits.device)
            bucket = replace(
                bucket,
                reference_nll=negative_log_likelihood(theirs, right),
                kl=kl_divergence(theirs, rows),
                agreed=agreement(rows, theirs),
            )
        found.append(bucket)
    return found
