"""Routes learned from sets of texts, a router's choice, and requests that take a plan by it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaskip_fx
from adaskip_fx.contrib.routing import Choice, Option, Route, Router, learn_routes, mean_embedding
from adaskip_fx.plans.decision_files import register_kind, save_decision
from adaskip_fx.plans.decisions import PlanChooser
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.policies import AdaSkip, LLMDrop
from adaskip_fx.profiles.profile import Profile
from tests.support.compiled_llamas import Entry, entry, fixed, make_model
from tests.support.decisions import EMPTY, SHAPE, SUBLAYERS, check, mean_by_hand
from tests.support.eager_reference import assert_close
from tests.support.generation import padded
from tests.support.profiles import profile
from tests.support.tokenizers import Letters, ids_of

LESS = SkipPlan.of(SUBLAYERS, ["2.ffn"])

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
    assert isinstance(fast.adaskip.plan, Choice)
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


# A choice --------------------------------------------------------------------------------------


def test_choices_that_are_refused() -> None:
    with pytest.raises(PlanError, match="a choice needs at least one plan, got none"):
        Choice(())
    with pytest.raises(PlanError, match="a choice names 'a' twice"):
        Choice((Option("a", EMPTY, (1.0,)), Option("a", LESS, (2.0,))))
    with pytest.raises(PlanError, match=re.escape("have different widths: [1, 2]")):
        Choice((Option("a", EMPTY, (1.0,)), Option("b", LESS, (2.0, 1.0))))
    for centroid in ((), (0.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(PlanError, match="option a: a centroid is finite and not zero"):
            Option("a", EMPTY, centroid)
    with pytest.raises(ValueError, match=re.escape("has shape [3], the centroids are 1 wide")):
        Choice((Option("a", EMPTY, (1.0,)),)).nearest([1.0, 2.0, 3.0])


def test_the_nearest_centroid_is_by_angle() -> None:
    """The longer centroid is nearer by distance and by dot product, not by angle."""
    choice = Choice((Option("a", EMPTY, (0.1, 0.0)), Option("b", LESS, (9.0, 9.0))))
    assert choice.nearest([5.0, 1.0]).name == "a"
    assert choice.nearest([5.0, 4.0]).name == "b"
    assert choice.nearest([0.0, 0.0]).name == "a", "the first, where nothing is nearer"


def test_the_mean_embedding_leaves_padding_out() -> None:
    bank = entry(SHAPE)
    ids, mask, _ = padded(bank)
    expected = mean_by_hand(bank.model, ids, mask)
    got = mean_embedding(bank.model, ids, mask)
    assert_close(got.double(), expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(mean_embedding(bank.model, ids).double(), expected, 1e-3)
    long = bank.tokens(1, 2500)  # more than are embedded at once
    assert_close(mean_embedding(bank.model, long).double(), mean_by_hand(bank.model, long), 1e-5)


def choice_of(bank: Entry, *prompts: torch.Tensor) -> Choice:
    """Attention 1 is skipped for the first prompt, ffn 0 and attention 2 for the second."""
    skips = (["1.attention"], ["0.ffn", "2.attention"])
    centroids = (tuple(mean_by_hand(bank.model, ids).tolist()) for ids in prompts)
    options = zip("ab", skips, centroids, strict=True)
    return Choice(tuple(Option(n, SkipPlan.of(SUBLAYERS, s), c) for n, s, c in options))


@pytest.mark.parametrize("bank", [entry, pytest.param(fixed, marks=pytest.mark.slow)])
def test_a_request_takes_the_plan_of_its_first_prompt(bank: Any) -> None:
    model = bank(SHAPE)
    first, second = model.tokens(1, 6, 0), model.tokens(1, 6, 50)
    choice = choice_of(model, first, second)
    for seed, own, other, layers in ((0, 0, 1, (0, 2)), (50, 1, 0, (0, 1))):
        plans = choice.plans
        cache = check(model, choice, lambda step, p=plans[own]: p, (6, 1, 1, 3, 1), seed=seed)
        assert cache.stored == tuple(layer in layers for layer in range(3))
        with pytest.raises(AssertionError, match="step 0: relative error"):
            check(model, choice, lambda step, p=plans[other]: p, (6, 1), seed=seed)


def test_a_choice_is_kept_for_later_turns_and_made_again_after_a_reset() -> None:
    bank = entry(SHAPE)
    first, second = bank.tokens(1, 6, 0), bank.tokens(1, 6, 50)
    choice = choice_of(bank, first, second)
    cache = bank.runtime.new_cache(plan=choice)
    with torch.no_grad():
        bank.compiled(first, past_key_values=cache)
        bank.compiled(second[:, :1], past_key_values=cache)
        bank.compiled(second, past_key_values=cache)
        assert cache.request.plan is choice.plans[0]
        assert copy.deepcopy(cache).request.plan is choice.plans[0]
        cache.reset()
        bank.compiled(second, past_key_values=cache)
    assert cache.request.plan is choice.plans[1]
    assert cache.stored == (True, True, False)


def test_a_batch_takes_one_plan() -> None:
    bank = entry(SHAPE)
    first, second = bank.tokens(1, 6, 0), bank.tokens(1, 6, 50)
    choice = choice_of(bank, first, second)
    cache = bank.runtime.new_cache(plan=choice)
    rows = torch.cat((second, second, first))
    with torch.no_grad():
        bank.compiled(rows, past_key_values=cache)
    assert choice.nearest(mean_by_hand(bank.model, rows)).name == "b"
    assert cache.request.plan is choice.plans[1]


class Elsewhere(PlanChooser):
    """A chooser whose choice is none of its plans."""

    kind = "elsewhere"
    plans = (EMPTY,)

    def choose(self, model: Any, input_ids: Any, attention_mask: Any) -> SkipPlan:
        return LESS


def test_a_plan_that_is_none_of_the_choosers_is_refused() -> None:
    bank = entry(SHAPE)
    cache = bank.runtime.new_cache(plan=Elsewhere())
    words = f"a elsewhere chose plan {LESS.digest[:8]}, which is none of its plans"
    with torch.no_grad(), pytest.raises(PlanError, match=words):
        bank.compiled(bank.tokens(1, 5), past_key_values=cache)


def test_what_only_looks_like_a_chooser_is_refused() -> None:
    class Alike:
        plans = (EMPTY,)
        sublayers = SUBLAYERS
        choose = Elsewhere.choose

    with pytest.raises(TypeError, match="a Schedule or a subclass of PlanChooser, got Alike"):
        entry(SHAPE).runtime.new_cache(plan=Alike())  # type: ignore[arg-type]


def test_kinds_of_files_have_names_of_their_own() -> None:
    class Nameless(Elsewhere):
        kind = "set of plans"

    class Other(Elsewhere):
        kind = "choice"

    for kind in (Nameless, Other):
        with pytest.raises(ValueError, match=f"{kind.__name__} needs a kind of its own"):
            register_kind(kind)


@pytest.mark.slow
def test_a_choice_is_loaded_by_whoever_knows_nothing_of_it(tmp_path: Path) -> None:
    choice = Choice((Option("a", EMPTY, (0.1, -3.0)), Option("b", LESS, (1e-7, 2.0))))
    save_decision(choice, tmp_path / "choice")
    done = subprocess.run(
        [sys.executable, "-m", "adaskip_fx", "inspect", str(tmp_path / "choice")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert str(choice) in done.stdout
