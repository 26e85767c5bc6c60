"""Routes learned from sets of texts, and a router's choice on a compiled model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import adaskip_fx
from adaskip_fx.contrib.routing import learn_routes
from adaskip_fx.plans.decisions import Choice
from adaskip_fx.policies import AdaSkip, LLMDrop, Route, Router
from adaskip_fx.profiles.profile import Profile
from tests.support.compiled_llamas import make_model
from tests.support.decisions import mean_by_hand
from tests.support.profiles import profile
from tests.support.tokenizers import Letters, ids_of

TEXTS = {
    "digits": ["31415926535897932384626", "27182818284590452353602"],
    "words": ["the quick brown fox jumps over", "a lazy dog sleeps all the day long"],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("three_layers")


@pytest.fixture(scope="module")
def routes(model: Any) -> tuple[Route, ...]:
    return learn_routes(model, Letters(), TEXTS, max_length=64)


def test_routes_are_profiles_and_mean_embeddings(model: Any, routes: tuple[Route, ...]) -> None:
    assert [route.name for route in routes] == list(TEXTS)
    for route, texts in zip(routes, TEXTS.values(), strict=True):
        alone = adaskip_fx.calibrate(model, Letters(), texts, max_length=64)
        np.testing.assert_array_equal(route.profile.statistics, alone.statistics)
        expected = sum(mean_by_hand(model, ids_of(text)) for text in texts) / len(texts)
        np.testing.assert_allclose(route.centroid, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_the_compiled_model_takes_the_plan_of_the_nearest(
    model: Any, routes: tuple[Route, ...]
) -> None:
    router = Router(routes, LLMDrop("joint", scaled=True))
    fast = adaskip_fx.compile(model, routes[0].profile, 1.5, policy=router, backend="eager")
    assert isinstance(fast.adaskip.decision, Choice)
    assert fast.adaskip.policy is None
    for text, route in (("8979323846", routes[0]), ("jumps over the dog", routes[1])):
        cache = fast.adaskip.new_cache()
        with torch.no_grad():
            fast(ids_of(text), past_key_values=cache)
        expected = LLMDrop("joint", scaled=True).plan(route.profile, 1.5)
        assert cache.request.plan == expected
    assert "choice" in str(fast.adaskip)
    assert f"  {routes[1].name}" in str(fast.adaskip)


def test_refusals(model: Any, routes: tuple[Route, ...]) -> None:
    with pytest.raises(ValueError, match="Router: no routes were given; learn_routes makes them"):
        Router(())
    with pytest.raises(ValueError, match="no texts were given; name a set of texts for each kind"):
        learn_routes(model, Letters(), {})
    with pytest.raises(ValueError, match="route digits was measured on"):
        Router(routes).plan(profile(3), 1.5)
    assert isinstance(routes[0].profile, Profile)


def test_plans_are_the_inner_policys(routes: tuple[Route, ...]) -> None:
    choice = Router(routes).plan(routes[0].profile, 1.5)
    assert [o.plan for o in choice.options] == [AdaSkip().plan(r.profile, 1.5) for r in routes]
    assert [o.centroid for o in choice.options] == [r.centroid for r in routes]
