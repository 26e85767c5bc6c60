"""Fits of surrogates: closed forms against numpy on all tokens, and plan order against hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from adaskip_fx.fitting import (
    DistillConfig,
    Fitter,
    Sample,
    SecondMoments,
    SurrogateFitter,
    SurrogateSpec,
    refine,
    solve,
    unexplained,
)
from adaskip_fx.fitting.distillation import _Loss
from adaskip_fx.fitting.least_squares import best_ridge, left_out, smallest_rank
from adaskip_fx.fitting.whitening import whitenings
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.runtime.oracle import Oracle
from adaskip_fx.testing import assert_equivalent
from tests.support.compiled_llamas import make_model
from tests.support.second_moments import HIDDEN, Array, drawn, moments_of
from tests.support.tokenizers import Letters


def weighted(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """z, x and t with every token divided by |x|."""
    size = np.linalg.norm(x, axis=1, keepdims=True)
    return np.hstack((x, np.ones((len(x), 1)))) / size, x / size, (y - x) / size


def as_map(surrogate: Surrogate) -> Array:
    t = surrogate.tensors
    weight = t["weight"] if "weight" in t else t["up"].astype(float) @ t["down"]
    return np.vstack((weight.T, t["bias"]))


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
    own = (z[:, :-1] * t).sum() / (z[:, :-1] ** 2).sum()  # what the map is held to
    towards = own * np.sqrt(ridge) * np.eye(HIDDEN)
    expected = np.linalg.lstsq(np.vstack((z, rows)), np.vstack((t, towards)))[0]
    fitted = as_map(solve(moments_of(x, y), "linear", ridge=0.01))
    np.testing.assert_allclose(fitted, expected, rtol=1e-5, atol=1e-6)
    stiff = solve(moments_of(x, y), "linear", ridge=1e9).tensors["weight"]
    np.testing.assert_allclose(stiff, own * np.eye(HIDDEN), atol=1e-5)
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
    assert unexplained(moments, fitted) == pytest.approx(left, rel=1e-5)
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
        assert unexplained(moments, fitted) == pytest.approx(left, rel=1e-5)
    ladder = [unexplained(moments, solve(moments, k, 4)) for k in ("scale", "diagonal")]
    ladder += [unexplained(moments, solve(moments, "low_rank", r)) for r in (2, 4, HIDDEN)]
    assert ladder == sorted(ladder, reverse=True)
    assert unexplained(moments, Surrogate.scale(1.0)) == 1.0


def test_unseen_texts_choose_ridge_and_rank() -> None:
    few = [moments_of(*drawn(12, seed=i, noise=1.0)) for i in range(3)]
    many = [moments_of(*drawn(2000, seed=i, noise=0.01)) for i in range(3)]
    assert best_ridge(few) > best_ridge(many)
    by_hand = [unexplained(a, solve(b, "linear", ridge=0.1)) for a, b in (few[:2], few[1::-1])]
    assert left_out(few[:2], "linear", 0, 0.1) == pytest.approx(sum(by_hand) / 2)
    assert smallest_rank(many, [1, 2, 4], slack=0.9)[0] == 1
    assert smallest_rank(many, [1, 2, 4], slack=0.0)[0] == HIDDEN
    assert SurrogateSpec("low_rank").fit(many[:1]).rank == 1
    assert SurrogateSpec("low_rank", rank=HIDDEN).fit(many).kind == "linear"


def test_texts_of_several_kinds_are_left_out_kind_by_kind() -> None:
    """A kind that is another function: only a stiff map holds for a kind that was not seen."""
    x, y = drawn(500, seed=0, noise=0.01)
    odd = moments_of(*(a := drawn(500, seed=1, noise=0.01))[:1], a[0] - (a[1] - a[0]))
    assert best_ridge([moments_of(x, y), odd]) > best_ridge([moments_of(x, y), moments_of(*a)])


def test_rungs_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown surrogate 'cubic': use one of scale, diagonal"):
        SurrogateSpec("cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank must be at least 1, and of low_rank, got 3"):
        SurrogateSpec("linear", rank=3)


# On a model ------------------------------------------------------------------------------------

TEXTS = tuple(f"{word} " * 30 for word in ("alpha", "beta", "gamma", "delta", "eta", "theta"))
LIMIT = 80
SKIPPED = ("0.ffn", "1.attention", "2.ffn")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("three_layers")


@pytest.fixture(scope="module")
def fitter(model: Any) -> Fitter:
    return Fitter(model, Letters(), TEXTS, max_length=LIMIT)


def streams(
    model: Any, modules: Any, skips: dict[str, Any], text: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    oracle = Oracle(model, modules, prefill=skips)
    ids = Letters()(text, truncation=True, max_length=LIMIT, return_tensors="pt")["input_ids"]
    with oracle.watching(), torch.no_grad():
        model(input_ids=ids)
    return oracle.streams


def expected_map(model: Any, modules: Any, name: str, before: dict[str, Any]) -> Array:
    pairs = [
        (streams(model, modules, before, t)[name][0], streams(model, modules, {}, t)[name][1])
        for t in TEXTS
    ]
    x, y = (torch.cat([p[i][0] for p in pairs]).double().numpy() for i in (0, 1))
    z, _, t = weighted(x, y)
    ridge = 1e-3 * np.diag(z.T @ z)[:-1].mean() * np.diag([1.0] * x.shape[1] + [0.0])
    own = (z[:, :-1] * t).sum() / (z[:, :-1] ** 2).sum()
    return np.linalg.solve(z.T @ z + ridge, z.T @ t + own * ridge[:, :-1])


def test_later_surrogates_see_compensated_streams(model: Any, fitter: Fitter) -> None:
    runtime = fitter.runtime
    plan = fitter.fit(SkipPlan.of(runtime.sublayers, SKIPPED), SurrogateSpec(ridge=1e-3))
    before: dict[str, Any] = {}
    for name in SKIPPED:
        expected = expected_map(model, runtime.graphs.structure.modules, name, before)
        surrogate = plan.surrogates.get(Sublayer.parse(name))
        assert surrogate is not None
        np.testing.assert_allclose(as_map(surrogate), expected, rtol=0.02, atol=2e-3)
        before[name] = surrogate
    alone = expected_map(model, runtime.graphs.structure.modules, "2.ffn", {})
    assert not np.allclose(as_map(before["2.ffn"]), alone, rtol=0.02, atol=2e-3)  # companion


def test_the_fit_is_the_plan_that_runs(model: Any, fitter: Fitter) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec("low_rank", rank=3)
    )
    assert [str(plan.surrogates.get(Sublayer.parse(n))) for n in SKIPPED] == ["rank 3"] * 3
    assert_equivalent(model, plan)


def test_beside_gives_every_running_ffn_its_own(model: Any, fitter: Fitter) -> None:
    sublayers = fitter.runtime.sublayers
    plan = fitter.fit(SkipPlan.of(sublayers, ["0.attention"]), SurrogateSpec(ridge=1e-3))
    extras = fitter.beside(plan, SurrogateSpec(ridge=1e-3))
    assert [str(s) for s in extras.by_sublayer] == ["0.ffn", "1.ffn", "2.ffn"]
    before = {"0.attention": plan.surrogates.get(Sublayer(0, "attention"))}
    expected = expected_map(model, fitter.runtime.graphs.structure.modules, "1.ffn", before)
    found = extras.get(Sublayer(1, "ffn"))
    assert found is not None
    np.testing.assert_allclose(as_map(found), expected, rtol=0.02, atol=2e-3)


def test_a_compensator_fits_what_is_known_once(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, moments = [], fitter.moments
    monkeypatch.setattr(fitter, "moments", lambda *a: passes.append(a) or moments(*a))
    surrogate_fitter = SurrogateFitter(fitter, SurrogateSpec(ridge=1e-3))
    known = (Sublayer(0, "ffn"), Sublayer(1, "attention"))
    plan = fitter.fit(SkipPlan.of(fitter.runtime.sublayers, known), SurrogateSpec(ridge=1e-3))
    both = surrogate_fitter((*known, Sublayer(2, "ffn")), known)
    beside = fitter.beside(plan, SurrogateSpec(ridge=1e-3), ("ffn",))
    assert both == plan.surrogates.merged(
        Surrogates({Sublayer(2, "ffn"): beside.by_sublayer[Sublayer(2, "ffn")]})
    )
    assert passes
    passes.clear()
    surrogate_fitter((*known, Sublayer(1, "ffn")), known)
    assert not passes, "it was fitted along with the other"
    whole = surrogate_fitter((*known, Sublayer(2, "ffn")))
    ordered = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, whole.by_sublayer), SurrogateSpec(ridge=1e-3)
    )
    assert whole == ordered.surrogates


def test_alone_each_is_fitted_as_if_the_others_ran(fitter: Fitter) -> None:
    plan = SkipPlan.of(fitter.runtime.sublayers, SKIPPED)
    alone = fitter.alone(plan, SurrogateSpec("normalized")).surrogates.by_sublayer
    in_order = fitter.fit(plan, SurrogateSpec("normalized")).surrogates.by_sublayer
    assert set(alone) == set(in_order) == set(plan.prefill)
    for sublayer in plan.prefill:
        one = fitter.fit(SkipPlan.of(plan.sublayers, [sublayer]), SurrogateSpec("normalized"))
        for name, tensor in one.surrogates.by_sublayer[sublayer].tensors.items():
            assert alone[sublayer].tensors[name] == pytest.approx(tensor, rel=1e-6, abs=1e-9)
    first, *later = plan.prefill
    assert alone[first] == in_order[first]  # nothing was skipped before it
    for sublayer in later:  # companion: in order, what was skipped before changes what they see
        assert alone[sublayer] != in_order[sublayer]


# By descent ------------------------------------------------------------------------------------


def kl(model: Any, modules: Any, skips: dict[str, Any], text: str) -> float:
    ids = Letters()(text, truncation=True, max_length=LIMIT, return_tensors="pt")["input_ids"]
    logits = []
    for skipped in ({}, skips):
        oracle = Oracle(model, modules, prefill=skipped)
        with oracle.watching(), torch.no_grad():
            logits.append(model(input_ids=ids).logits[0].double())
    p, q = (one.log_softmax(-1) for one in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def samples(fitter: Fitter) -> list[Sample]:
    return [Sample(ids) for ids in fitter.samples]


@pytest.mark.parametrize(
    "rung",
    [SurrogateSpec("low_rank", rank=2), SurrogateSpec("normalized"), SurrogateSpec("diagonal")],
)
def test_descent_brings_predictions_nearer(model: Any, fitter: Fitter, rung: SurrogateSpec) -> None:
    runtime = fitter.runtime
    plan = fitter.fit(SkipPlan.of(runtime.sublayers, SKIPPED), rung)
    how = DistillConfig(steps=20, rate=5e-3, batch=1, every=5)
    one = samples(fitter)[:1]
    refined, seen = refine(fitter, plan, [one], one, how)
    assert seen.step > 0
    assert set(seen.losses) == {0, 5, 10, 15, 20}
    assert (refined.prefill, refined.decode) == (plan.prefill, plan.decode)
    for each, loss in ((plan, seen.losses[0]), (refined, min(seen.losses.values()))):
        skips = {str(s): c for s, c in each.surrogates.by_sublayer.items()}
        assert kl(model, runtime.graphs.structure.modules, skips, TEXTS[0]) == pytest.approx(
            loss, rel=1e-3
        )
    assert min(seen.losses.values()) < 0.95 * seen.losses[0]
    assert all(p.grad is None for p in model.parameters())
    assert_equivalent(model, refined)


def test_a_step_moves_a_map_in_all_directions_alike_and_a_bias_in_all_elements(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED[:1]), SurrogateSpec("normalized")
    )
    one = samples(fitter)[:1]
    how = DistillConfig(steps=1, rate=1e-3, batch=1)
    slopes = dict[str, torch.Tensor]()
    whole = torch.autograd.grad

    def watched(loss: torch.Tensor, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        found = whole(loss, parameters)
        slopes.update(
            {"weight" if p.ndim == 2 else "bias": s for p, s in zip(parameters, found, strict=True)}
        )
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    moved, _ = refine(fitter, plan, [one], one, how)
    (skipped,) = plan.prefill
    whitening = whitenings(fitter, plan)[skipped]
    before, after = (p.surrogates.by_sublayer[skipped].tensors for p in (plan, moved))
    change = {name: torch.tensor(after[name] - before[name]) for name in before}
    step = change["weight"].double() @ torch.linalg.inv(whitening.root.double()) / whitening.size
    sizes = torch.linalg.svdvals(step)
    full = 0.2 * sizes.numel() ** 0.5 * how.rate / (1 + 0.05)  # as large as a step of Adam
    assert sizes.max() < 1.3 * full
    assert sizes.median() > 0.7 * full
    bias = change["bias"].double() / whitening.size
    assert bias.numpy() == pytest.approx(-slopes["bias"].sign() * how.rate / 1.05, rel=1e-2)
    steep = torch.linalg.svdvals(slopes["weight"].double())
    assert steep.max() > 10 * steep.median()  # companion: the slope itself is not alike


def test_weights_say_which_tokens_matter(fitter: Fitter) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec("low_rank", rank=2)
    )
    ids = fitter.samples[0]
    last = torch.zeros(ids.shape[1])
    last[-1] = 3.0
    how = DistillConfig(steps=6, rate=2e-2, batch=1, every=6)
    whole, _ = refine(fitter, plan, [[Sample(ids)]], [Sample(ids)], how)
    one, seen = refine(fitter, plan, [[Sample(ids, last)]], [Sample(ids, last)], how)
    assert seen.losses[6] < seen.losses[0]
    assert one != whole


def test_what_held_out_texts_like_best_is_kept(fitter: Fitter) -> None:
    plan = fitter.fit(SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec())
    how = DistillConfig(steps=2, rate=10.0, every=1)
    known = samples(fitter)
    same, seen = refine(fitter, plan, [known[:1], known[1:2]], known[2:4], how)
    assert seen.step == 0
    assert seen.losses[2] > seen.losses[0]
    assert same == plan


def test_samples_of_a_step_go_together_and_alone_where_there_is_no_room(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fitter.fit(
        SkipPlan.of(fitter.runtime.sublayers, SKIPPED), SurrogateSpec("low_rank", rank=2)
    )
    known = samples(fitter)
    cut = [Sample(k.ids[:, :30]) for k in known[:3]] + [Sample(known[3].ids[:, :20])]
    how = DistillConfig(steps=3, rate=1e-3, batch=4, every=3)
    seen = list[tuple[int, int]]()
    whole = _Loss.__call__

    def watched(self: _Loss, some: Sequence[Sample]) -> torch.Tensor:
        seen.append((len(some), some[0].ids.shape[1]))
        return whole(self, some)

    monkeypatch.setattr(_Loss, "__call__", watched)
    together, _ = refine(fitter, plan, [cut], cut[:1], how)
    assert (3, 30) in seen
    assert (1, 20) in seen

    def crowded(self: _Loss, some: Sequence[Sample]) -> torch.Tensor:
        if len(some) > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(self, some)

    monkeypatch.setattr(_Loss, "__call__", crowded)
    alone, _ = refine(fitter, plan, [cut], cut[:1], how)
    for sublayer, one in together.surrogates.by_sublayer.items():
        for name, tensor in alone.surrogates.by_sublayer[sublayer].tensors.items():
            assert tensor == pytest.approx(one.tensors[name], abs=1e-5)
    assert together != plan  # companion: something was learned

    def full(self: _Loss, some: Sequence[Sample]) -> torch.Tensor:
        if torch.is_grad_enabled() and seen:
            raise torch.OutOfMemoryError("no room at all")
        return whole(self, some)

    monkeypatch.setattr(_Loss, "__call__", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room at all"):
        refine(fitter, plan, [cut], cut[:1], how)


def test_what_cannot_be_refined(fitter: Fitter) -> None:
    plan = SkipPlan.of(fitter.runtime.sublayers, SKIPPED)
    known = samples(fitter)
    with pytest.raises(ValueError, match="the plan has no surrogate to refine; fit one first"):
        refine(fitter, plan, [known], known)
    with pytest.raises(ValueError, match="refining needs samples to descend on and samples that"):
        refine(fitter, plan, [known], [])
    with pytest.raises(ValueError, match="rate must be positive, got 0"):
        DistillConfig(rate=0)
