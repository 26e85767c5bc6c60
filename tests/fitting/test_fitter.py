"""Fits in the order of a plan, against hooks on the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adaskip_fx.fitting import Fitter, SurrogateFitter, SurrogateSpec
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.runtime.oracle import Oracle
from adaskip_fx.testing import assert_equivalent
from tests.support.fits import LIMIT, SKIPPED, TEXTS
from tests.support.second_moments import Array, as_map, weighted
from tests.support.tokenizers import Letters


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
    gain = (z[:, :-1] * t).sum() / (z[:, :-1] ** 2).sum()
    return np.linalg.solve(z.T @ z + ridge, z.T @ t + gain * ridge[:, :-1])


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


def test_every_running_ffn_gets_a_surrogate(model: Any, fitter: Fitter) -> None:
    sublayers = fitter.runtime.sublayers
    plan = fitter.fit(SkipPlan.of(sublayers, ["0.attention"]), SurrogateSpec(ridge=1e-3))
    extras = fitter.fit_running(plan, SurrogateSpec(ridge=1e-3))
    assert [str(s) for s in extras.by_sublayer] == ["0.ffn", "1.ffn", "2.ffn"]
    before = {"0.attention": plan.surrogates.get(Sublayer(0, "attention"))}
    expected = expected_map(model, fitter.runtime.graphs.structure.modules, "1.ffn", before)
    found = extras.get(Sublayer(1, "ffn"))
    assert found is not None
    np.testing.assert_allclose(as_map(found), expected, rtol=0.02, atol=2e-3)


def test_a_surrogate_fitter_fits_what_is_known_once(
    fitter: Fitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, moments = [], fitter.second_moments
    monkeypatch.setattr(fitter, "second_moments", lambda *a: passes.append(a) or moments(*a))
    surrogate_fitter = SurrogateFitter(fitter, SurrogateSpec(ridge=1e-3))
    known = (Sublayer(0, "ffn"), Sublayer(1, "attention"))
    plan = fitter.fit(SkipPlan.of(fitter.runtime.sublayers, known), SurrogateSpec(ridge=1e-3))
    both = surrogate_fitter((*known, Sublayer(2, "ffn")), known)
    beside = fitter.fit_running(plan, SurrogateSpec(ridge=1e-3), ("ffn",))
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


def test_independently_each_is_fitted_as_if_the_others_ran(fitter: Fitter) -> None:
    plan = SkipPlan.of(fitter.runtime.sublayers, SKIPPED)
    alone = fitter.fit_independently(plan, SurrogateSpec("normalized")).surrogates.by_sublayer
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
