"""Closed forms of surrogates against numpy on all tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaskip_fx.fitting import SecondMoments, SurrogateSpec, solve, unexplained_variance
from adaskip_fx.fitting.least_squares import best_ridge, cross_validation_error, smallest_rank
from adaskip_fx.plans.surrogate import Surrogate
from tests.support.second_moments import HIDDEN, as_map, drawn, moments_of, weighted


def test_moments_do_not_depend_on_how_texts_are_cut() -> None:
    x, y = drawn()
    whole, cut = moments_of(x, y, 1), moments_of(x, y, 7)
    assert whole.tokens == cut.tokens == 400
    assert whole.inputs.shape == (HIDDEN + 1, HIDDEN + 1)
    torch.testing.assert_close(whole.inputs, cut.inputs)
    torch.testing.assert_close(whole.products, cut.products)
    half = moments_of(x[:150], y[:150]).plus(moments_of(x[150:], y[150:]))
    torch.testing.assert_close(half.inputs, whole.inputs)
    torch.testing.assert_close(half.targets, whole.targets)


def test_a_token_without_a_stream_counts_for_nothing() -> None:
    x, y = drawn(50)
    for kind in ("linear", "diagonal"):
        with_zero = moments_of(np.vstack((x, np.zeros((1, HIDDEN)))), np.vstack((y, y[:1])))
        fitted, expected = (solve(m, kind) for m in (with_zero, moments_of(x, y)))  # type: ignore[arg-type]
        for name, tensor in expected.tensors.items():
            np.testing.assert_allclose(fitted.tensors[name], tensor, rtol=1e-6)


def test_linear_is_weighted_ridge_regression() -> None:
    x, y = drawn()
    z, _, t = weighted(x, y)
    ridge = 0.01 * np.diag(z.T @ z)[:-1].mean()
    rows = np.hstack((np.sqrt(ridge) * np.eye(HIDDEN), np.zeros((HIDDEN, 1))))
    gain = (z[:, :-1] * t).sum() / (z[:, :-1] ** 2).sum()  # what the map is held to
    towards = gain * np.sqrt(ridge) * np.eye(HIDDEN)
    expected = np.linalg.lstsq(np.vstack((z, rows)), np.vstack((t, towards)))[0]
    fitted = as_map(solve(moments_of(x, y), "linear", ridge=0.01))
    np.testing.assert_allclose(fitted, expected, rtol=1e-5, atol=1e-6)
    stiff = solve(moments_of(x, y), "linear", ridge=1e9).tensors["weight"]
    np.testing.assert_allclose(stiff, gain * np.eye(HIDDEN), atol=1e-5)
    unweighted = np.linalg.lstsq(np.hstack((x, np.ones((len(x), 1)))), y - x)[0]
    assert not np.allclose(fitted, unweighted, rtol=1e-2)  # companion: weights matter


def test_a_normalized_map_is_ridge_regression_on_normalized_streams() -> None:
    x, y = drawn()
    size = np.linalg.norm(x, axis=1, keepdims=True)
    normal = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    z, t = np.hstack((normal, np.ones((len(x), 1)))) / size, (y - x) / size
    ridge = 0.01 * np.diag(z.T @ z)[:-1].mean() * np.diag([1.0] * HIDDEN + [0.0])
    moments = SecondMoments.zeros(HIDDEN, torch.device("cpu"), normalized=True)
    moments.add(torch.tensor(x), torch.tensor(y))
    fitted = solve(moments, "normalized", ridge=0.01)
    expected = np.linalg.solve(z.T @ z + ridge, z.T @ t)
    np.testing.assert_allclose(as_map(fitted), expected, rtol=1e-5, atol=1e-6)
    left = ((t - z @ as_map(fitted)) ** 2).sum() / (t**2).sum()
    assert unexplained_variance(moments, fitted) == pytest.approx(left, rel=1e-5)
    assert moments.minus(moments).normalized


def test_scale_and_diagonal_are_regressions() -> None:
    x, y = drawn()
    _, u, t = weighted(x, y)
    v = u + t
    scale = solve(moments_of(x, y), "scale")
    assert scale.factor == pytest.approx((u * v).sum() / (u * u).sum())
    diagonal = solve(moments_of(x, y), "diagonal").tensors["factor"]
    np.testing.assert_allclose(diagonal, (u * v).sum(0) / (u * u).sum(0), rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, HIDDEN])
def test_low_rank_is_the_best_of_its_rank(rank: int) -> None:
    """Reduced-rank regression, written as in textbooks: project the fitted values."""
    x, y = drawn()
    z, _, t = weighted(x, y)
    last = z[:, -1:]  # the constant, to be taken out of both sides
    out = np.eye(len(z)) - last @ np.linalg.pinv(last)
    a, b = out @ z[:, :-1], out @ t
    full = np.linalg.lstsq(a, b)[0]
    _, _, right = np.linalg.svd(a @ full, full_matrices=False)
    best = full @ right[:rank].T @ right[:rank]
    bias = np.linalg.lstsq(last, t - z[:, :-1] @ best)[0]
    fitted = solve(moments_of(x, y), "low_rank", rank, ridge=0.0)
    assert fitted.rank == rank
    np.testing.assert_allclose(as_map(fitted), np.vstack((best, bias)), rtol=1e-4, atol=1e-5)


def test_what_stays_unexplained() -> None:
    x, y = drawn()
    z, _, t = weighted(x, y)
    moments = moments_of(x, y)
    for kind in ("linear", "low_rank"):
        fitted = solve(moments, kind, 2)  # type: ignore[arg-type]
        left = ((t - z @ as_map(fitted)) ** 2).sum() / (t**2).sum()
        assert unexplained_variance(moments, fitted) == pytest.approx(left, rel=1e-5)
    left = [unexplained_variance(moments, solve(moments, k, 4)) for k in ("scale", "diagonal")]
    left += [unexplained_variance(moments, solve(moments, "low_rank", r)) for r in (2, 4, HIDDEN)]
    assert left == sorted(left, reverse=True)
    assert unexplained_variance(moments, Surrogate.scale(1.0)) == 1.0


def test_unseen_texts_choose_ridge_and_rank() -> None:
    few = [moments_of(*drawn(12, seed=i, noise=1.0)) for i in range(3)]
    many = [moments_of(*drawn(2000, seed=i, noise=0.01)) for i in range(3)]
    assert best_ridge(few) > best_ridge(many)
    by_hand = [
        unexplained_variance(a, solve(b, "linear", ridge=0.1)) for a, b in (few[:2], few[1::-1])
    ]
    assert cross_validation_error(few[:2], "linear", 0, 0.1) == pytest.approx(sum(by_hand) / 2)
    assert smallest_rank(many, [1, 2, 4], slack=0.9)[0] == 1
    assert smallest_rank(many, [1, 2, 4], slack=0.0)[0] == HIDDEN
    assert SurrogateSpec("low_rank").fit(many[:1]).rank == 1
    assert SurrogateSpec("low_rank", rank=HIDDEN).fit(many).kind == "linear"


def test_texts_of_several_kinds_are_left_out_kind_by_kind() -> None:
    """A kind that is another function: only a stiff map holds for a kind that was not seen."""
    x, y = drawn(500, seed=0, noise=0.01)
    odd = moments_of(*(a := drawn(500, seed=1, noise=0.01))[:1], a[0] - (a[1] - a[0]))
    assert best_ridge([moments_of(x, y), odd]) > best_ridge([moments_of(x, y), moments_of(*a)])


def test_specs_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown surrogate 'cubic': use one of scale, diagonal"):
        SurrogateSpec("cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be at least 1, and of low_rank, got 3"):
        SurrogateSpec("linear", rank=3)
