"""How well logits predict tokens, and how far they are from other logits: sums over tokens.

Logits are taken 256 rows at a time, in float32: log-probabilities of a vocabulary are large.
Sums are float64.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy

_ROWS = 256


def negative_log_likelihood(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the sum over tokens of -log p(token), in nats.

    Args:
        logits: [T, V], of any floating dtype.
        ids: int64 [T], the tokens that they predict, on the same device.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, right in zip(torch.split(logits, _ROWS), torch.split(ids, _ROWS), strict=True):
        total += cross_entropy(rows.float(), right, reduction="sum")
    return float(total)


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the sum over tokens of KL(reference || logits), in nats.

    Args:
        reference: [T, V], logits or log-probabilities of any floating dtype; they are normalized.
        logits: [T, V].
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for wanted, rows in zip(torch.split(reference, _ROWS), torch.split(logits, _ROWS), strict=True):
        p = wanted.to(logits.device).float().log_softmax(-1)
        q = rows.float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum(dtype=torch.float64)
    return float(total)


def agreement(logits: torch.Tensor, other: torch.Tensor) -> int:
    """Return for how many rows both logits [T, V] find the same token the likeliest."""
    return int((logits.argmax(-1) == other.to(logits.device).argmax(-1)).sum())


def perplexity(nll: float, tokens: int) -> float:
    """Return the exponential of the mean; infinite where a float cannot hold it."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
