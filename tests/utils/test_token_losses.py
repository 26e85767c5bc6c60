"""Sums over tokens against the same sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from adaskip_fx.utils.token_losses import (
    agreement,
    kl_divergence,
    negative_log_likelihood,
    perplexity,
)


def logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed)) * 3


def probabilities(row: torch.Tensor) -> list[float]:
    weights = [math.exp(v) for v in row.tolist()]
    return [w / sum(weights) for w in weights]


def test_sums_by_hand() -> None:
    rows = 300  # more than are taken at once
    ours, theirs = logits(rows, 0), logits(rows, 1)
    ids = torch.randint(0, 7, (rows,), generator=torch.Generator().manual_seed(2))
    pairs = [(probabilities(p), probabilities(q)) for p, q in zip(theirs, ours, strict=True)]
    nll = -sum(math.log(q[i]) for (_, q), i in zip(pairs, ids.tolist(), strict=True))
    kl = sum(a * math.log(a / b) for p, q in pairs for a, b in zip(p, q, strict=True))
    same = sum(p.index(max(p)) == q.index(max(q)) for p, q in pairs)
    assert negative_log_likelihood(ours, ids) == pytest.approx(nll, rel=1e-5)
    assert kl_divergence(theirs, ours) == pytest.approx(kl, rel=1e-5)
    assert kl_divergence(theirs.log_softmax(-1), ours) == pytest.approx(kl, rel=1e-5)
    assert kl_divergence(ours, theirs) != pytest.approx(kl, rel=1e-2)  # it has a direction
    assert agreement(ours, theirs) == same


def test_the_same_logits_do_not_differ() -> None:
    ours = logits(4, 0)
    assert kl_divergence(ours, ours + 2) == pytest.approx(0, abs=1e-6)
    assert agreement(ours, ours) == 4


def test_perplexity_may_be_infinite() -> None:
    assert perplexity(2 * math.log(5), 2) == pytest.approx(5)
    assert perplexity(1e9, 1) == math.inf
