"""How well a model predicts windows of text, by position, and how far from a reference model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from adaskip_fx.utils.files import JSON

_CHUNK = 256  # positions at a time: log-probabilities of a vocabulary are large


@dataclass(frozen=True)
class Bucket:
    """Sums over the predicted tokens at positions `first` to before `last`.

    Attributes:
        first, last: positions; `last` None for no end.
        tokens: how many were predicted.
        nll: negative log-likelihood, nats.
        reference_nll: likewise of the reference model.
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
        """Means over the tokens, and perplexities."""
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


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def perplexity(nll: float, tokens: int) -> float:
    """The exponential of the mean; infinite where a float cannot hold it."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def by_position(
    tokens: Sequence[int],
    logits: torch.Tensor,
    others: torch.Tensor | None,
    edges: Sequence[int],
) -> list[Bucket]:
    """One window's sums, for each bucket that has predicted tokens in it.

    Args:
        tokens: of the window; the first is predicted by nothing.
        logits: the model's that predict the others, [tokens - 1, V].
        others: the reference model's.
        edges: where buckets end; the last one has no end.
    """
    ids = torch.tensor(tokens, device=logits.device)
    found = []
    for first, last in pairwise([0, *edges, None]):
        assert first is not None
        end = len(ids) if last is None else min(last, len(ids))
        total = Bucket(first, last)
        if others is not None:
            total = replace(total, reference_nll=0.0, kl=0.0, agreed=0)
        for begin in range(max(first, 1), end, _CHUNK):
            stop = min(begin + _CHUNK, end)
            before = slice(begin - 1, stop - 1)
            theirs = None if others is None else others[before]
            total = total + _summed(total, ids[begin:stop], logits[before], theirs)
        if total.tokens:
            found.append(total)
    return found


def _summed(
    bucket: Bucket, ids: torch.Tensor, logits: torch.Tensor, others: torch.Tensor | None
) -> Bucket:
    """`bucket` of these tokens [T] and of the logits [T, V] that predict them."""
    logits = logits.float()
    nll = float(cross_entropy(logits, ids, reduction="sum"))
    if others is None:
        return replace(bucket, tokens=len(ids), nll=nll)
    others = others.float().to(logits.device)
    ours, theirs = log_softmax(logits, -1), log_softmax(others, -1)
    return replace(
        bucket,
        tokens=len(ids),
        nll=nll,
        reference_nll=float(cross_entropy(others, ids, reduction="sum")),
        kl=float(kl_div(ours, theirs, reduction="sum", log_target=True)),
        agreed=int((logits.argmax(-1) == others.argmax(-1)).sum()),
    )
