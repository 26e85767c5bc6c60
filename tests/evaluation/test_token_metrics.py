"""Sums by position against the same sums written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from adaskip_fx.evaluation.result import Scores, standard_error
from adaskip_fx.evaluation.token_metrics import Bucket, by_position
from adaskip_fx.utils.token_losses import perplexity


def _logits(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, 11, generator=torch.Generator().manual_seed(seed)) * 3


def _probabilities(row: torch.Tensor) -> list[float]:
    weights = [math.exp(v) for v in row.tolist()]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("edges", [(), (4,), (4, 9), (4, 9, 700)])
def test_by_position_by_hand(edges: tuple[int, ...]) -> None:
    size = 600  # more than one chunk
    tokens = torch.randint(0, 11, (size,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = _logits(size, 1), _logits(size, 2)
    expected: dict[int, list[float]] = {}
    for position in range(1, size):
        p, q = _probabilities(ours[position - 1]), _probabilities(theirs[position - 1])
        first = max(e for e in (0, *edges) if e <= position)
        sums = expected.setdefault(first, [0.0] * 5)
        sums[0] += 1
        sums[1] -= math.log(p[tokens[position]])
        sums[2] -= math.log(q[tokens[position]])
        sums[3] += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        sums[4] += p.index(max(p)) == q.index(max(q))
    found = by_position(tokens, ours, theirs, edges)
    assert [b.first for b in found] == sorted(expected)
    for bucket in found:
        n, nll, reference, kl, agreed = expected[bucket.first]
        assert (bucket.tokens, bucket.agreed) == (n, agreed)
        assert bucket.nll == pytest.approx(nll, rel=1e-5)
        assert bucket.reference_nll == pytest.approx(reference, rel=1e-5)
        assert bucket.kl == pytest.approx(kl, rel=1e-5)
    alone = by_position(tokens, ours, None, edges)
    assert [b.nll for b in alone] == pytest.approx([b.nll for b in found])
    assert {(b.kl, b.reference_nll, b.agreed) for b in alone} == {(None, None, None)}


def test_the_same_predictions_have_no_divergence() -> None:
    logits = _logits(8, 3)
    (bucket,) = by_position(range(9), logits, logits.clone(), ())
    assert bucket.kl == pytest.approx(0, abs=1e-6)
    assert bucket.agreed == bucket.tokens == 8
    (other,) = by_position(range(9), logits, logits + torch.eye(8, 11), ())
    assert other.kl is not None
    assert other.kl > 0.01


def test_a_bucket_says_means() -> None:
    one = Bucket(0, 4, tokens=2, nll=math.log(4), reference_nll=0.0, kl=1.0, agreed=1)
    total = (one + one).to_json()
    assert total["tokens"] == 4
    assert total["perplexity"] == pytest.approx(2)  # four to the half
    assert total["reference_perplexity"] == 1
    assert total["kl"] == 0.5
    assert total["agreement"] == 0.5
    assert set(Bucket(0, None, 1, 1.0).to_json()) == {"first", "last", "tokens", "perplexity"}
    assert perplexity(1e6, 1) == math.inf


def test_means_and_their_errors_by_hand() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)  # sqrt(1/2) / sqrt(2)
    scores = Scores.of([1.0, 0.0, 0.0, 1.0])
    assert (scores.mean, scores.error) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2))
    # windows of 1 and 3 tokens: (2 + 3) / 4 nats; the windows' means are 2 and 1
    windows = Scores.of_windows([(2.0, 1), (3.0, 3)])
    assert windows.values == (2.0, 1.0)
    assert windows.mean == pytest.approx(math.exp(1.25))
    assert windows.error == pytest.approx(math.exp(1.25) * 0.5)
