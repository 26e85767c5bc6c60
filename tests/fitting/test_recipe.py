"""The whole recipe on a tiny model, its command, and the texts that it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaskip_fx
from adaskip_fx import Profile, SkipPlan, Sublayer
from adaskip_fx.api import build
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.fitting import Recipe, SurrogateSpec
from adaskip_fx.fitting.retrieval_prompts import retrieval_samples
from adaskip_fx.fitting.synthetic_text import seed_prompts, write_texts
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import AdaSkip, Fitted, OnlinePolicy
from tests.support.compiled_llamas import make_model
from tests.support.recipe_tokenizers import Letters

TEXTS = {
    "words": [f"{w} " * 60 for w in ("alpha", "beta", "gamma", "delta", "eta", "theta")],
    "dashes": [f"{w}- " * 60 for w in ("one", "two", "three", "four")],
}
QUICK = Recipe(synthetic_samples=3, max_length=360, steps=4, shortlist=None)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("three_layers")


@pytest.fixture(scope="module")
def profile(model: Any) -> Profile:
    return adaskip_fx.calibrate(model, Letters(), TEXTS["words"], 200)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def plan(model: Any, profile: Profile, said: list[str]) -> SkipPlan:
    return adaskip_fx.fit(model, Letters(), TEXTS, profile, 1.5, QUICK, say=said.append)


def test_the_recipe_loses_less_than_adaskip(model: Any, profile: Profile, plan: SkipPlan) -> None:
    assert len(plan.skipped("prefill")) == 2
    assert plan.prefill == plan.decode
    kinds = {plan.surrogates.by_sublayer[s].kind for s in plan.prefill}
    assert kinds == {"normalized"}
    unseen = Letters()(TEXTS["words"][4])["input_ids"]  # the fifth: held out
    loss = CalibrationLoss(model, [unseen], backend="eager")
    assert loss(plan) < loss(AdaSkip().plan(profile, 1.5))


def test_it_says_what_it_does(plan: SkipPlan, said: list[str]) -> None:
    assert said[0] == "write 3 samples of 360 tokens"
    assert said[1] == "search"
    assert said[2].startswith("fit 2 surrogates on ")
    assert said[3].startswith("distilled: KL of validation samples from ")
    assert said[4].startswith("decoding may add ")


@pytest.mark.slow
def test_without_a_search_a_policy_chooses(model: Any, profile: Profile) -> None:
    recipe = Recipe(
        False, SurrogateSpec("linear"), synthetic_samples=0, max_length=200, steps=0, extras=False
    )
    plan = adaskip_fx.fit(model, Letters(), TEXTS, profile, 1.5, recipe)
    wanted = AdaSkip().plan(profile, 1.5)
    assert plan.prefill == wanted.prefill
    assert set(plan.surrogates.by_sublayer) == set(plan.prefill)
    assert plan.surrogates.kinds == "linear"
    quick = replace(recipe, in_order=False)
    at_once = adaskip_fx.fit(model, Letters(), TEXTS, profile, 1.5, quick).surrogates.by_sublayer
    first, *later = wanted.prefill
    assert at_once[first] == plan.surrogates.by_sublayer[first]
    assert all(at_once[s] != plan.surrogates.by_sublayer[s] for s in later)
    assert later
    nothing = adaskip_fx.fit(model, Letters(), TEXTS, profile, 1.0, recipe)
    assert nothing == SkipPlan.empty(profile.sublayers)


def test_too_few_texts_are_refused(model: Any, profile: Profile) -> None:
    with pytest.raises(ValueError, match="give at least two texts of each kind: one is held out"):
        adaskip_fx.fit(model, Letters(), {"one": TEXTS["words"][:1]}, profile, 1.5, QUICK)


@pytest.mark.slow
def test_a_compiled_model_takes_the_plan(
    model: Any, profile: Profile, plan: SkipPlan, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.json")
    ids = Letters()("beta gamma ")["input_ids"]
    from_file = adaskip_fx.compile(model, None, plan=tmp_path / "plan.json", backend="eager")
    given = adaskip_fx.compile(model, profile, policy=Fitted(plan), backend="eager")
    with torch.no_grad():
        assert torch.equal(from_file(input_ids=ids).logits, given(input_ids=ids).logits)


# Decoding may add what has a surrogate ----------------------------------------------------------


def window(count: int, similarity: float) -> np.ndarray[Any, Any]:
    return np.array([[similarity, 1.0, 1.0, 1.0, 1.0]] * count)


def test_only_what_was_fitted_is_added(profile: Profile) -> None:
    sublayers = profile.sublayers
    ffns = tuple(s for s in sublayers if s.kind == "ffn")
    surrogates = Surrogates.scale({Sublayer(0, "attention"): 1.1, ffns[1]: 0.9})
    plan = SkipPlan.of(sublayers, ["0.attention"], surrogates=surrogates)
    policy = Fitted(plan)
    assert isinstance(policy, OnlinePolicy)
    assert policy.plan(profile, 7.0) == replace(plan, fingerprint=profile.fingerprint)
    assert policy.online
    assert policy.extras == (ffns[1],)
    more = policy.online_plan(profile, plan, window(3, 0.9999), ffns)
    assert set(more.decode) == {Sublayer(0, "attention"), ffns[1]}
    assert more.surrogates == plan.surrogates
    every = AdaSkip().online_plan(profile, plan, window(3, 0.9999), ffns)
    assert set(every.decode) > set(more.decode)  # companion: AdaSkip alone would add them all
    assert policy.online_plan(profile, plan, window(3, -1.0), ffns).decode == plan.decode
    assert not Fitted(SkipPlan.of(sublayers, ["0.attention"])).online
    with pytest.raises(ValueError, match="they are of different models"):
        Fitted(SkipPlan.of(sublayers[:2], ["0.ffn"])).plan(profile, 1.2)


# Texts that are made ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_writes_what_it_would_sample(model: Any) -> None:
    runtime = runtime_of(build(model, None, backend="eager"))
    state = torch.random.get_rng_state()
    texts = write_texts(runtime, Letters(), 5, 24, batch_size=2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [tuple(t.shape) for t in texts] == [(1, 24)] * 5
    again = write_texts(runtime, Letters(), 5, 24, batch_size=2, seed=1)
    assert all(map(torch.equal, texts, again))
    other = write_texts(runtime, Letters(), 5, 24, batch_size=2, seed=2)
    assert not all(map(torch.equal, texts, other))
    likely = [surprise(model, t) for t in texts]
    drawn = torch.randint(0, 61, (5, 1, 24), generator=torch.Generator().manual_seed(0))
    assert np.mean(likely) < np.mean([surprise(model, t) for t in drawn])
    with pytest.raises(ValueError, match="write at least one text of two tokens, got 0 of 24"):
        write_texts(runtime, Letters(), 0, 24)


@pytest.mark.slow
def test_rows_of_one_batch_begin_in_their_own_ways(model: Any) -> None:
    runtime = runtime_of(build(model, None, backend="eager"))
    texts = [text_of(t) for t in write_texts(runtime, Letters(), 24, 40, batch_size=24, seed=1)]
    openings = [
        text_of(Letters()(o)["input_ids"])[:32] for some in seed_prompts().values() for o in some
    ]

    def openings_of(row: list[int]) -> set[tuple[int, ...]]:
        return {tuple(o) for o in openings if len(o) > 3 and row[: len(o)] == o}

    opened = [row for i, row in enumerate(texts) if i % 5]
    begun = [max(openings_of(row), key=len) for row in opened if openings_of(row)]
    assert len(begun) > 6  # (openings of three letters may be drawn by chance, and don't count)
    assert len(set(begun)) > 6
    assert len({len(o) for o in begun}) > 3  # longer ones go on where others are sampled
    assert not any(map(openings_of, texts[0::5]))  # companion: these begin with a drawn token


@torch.no_grad()
def surprise(model: Any, ids: torch.Tensor) -> float:
    return float(model(input_ids=ids, labels=ids).loss)


def text_of(ids: torch.Tensor) -> list[int]:
    return [int(i) for i in ids.reshape(-1)]


def test_answers_are_in_the_text_and_have_half_of_the_weight() -> None:
    sources = [Letters()("lorem ipsum dolor " * 80)["input_ids"]]
    for sample in retrieval_samples(Letters(), sources, 6, 700, seed=3):
        assert tuple(sample.ids.shape) == (1, 700)
        shares = sample.shares
        assert float(shares.sum()) == pytest.approx(1.0)
        heavy = shares > 1.5 * shares.min()
        predicted = [i + 1 for i in heavy.nonzero().reshape(-1).tolist()]
        assert float(shares[heavy].sum()) == pytest.approx(0.5 + 0.5 * len(predicted) / 700)
        whole = text_of(sample.ids)
        runs = np.split(np.array(predicted), np.where(np.diff(predicted) > 1)[0] + 1)
        for run in runs:
            answer = [whole[i] for i in run]
            places = [i for i in range(700) if whole[i : i + len(answer)] == answer]
            assert min(places) < run[0], "hidden before it is asked for"


def test_questions_need_room() -> None:
    sources = [Letters()("lorem ipsum dolor " * 80)["input_ids"]]
    with pytest.raises(ValueError, match="60 tokens are too few for a question"):
        retrieval_samples(Letters(), sources, 1, 60)
    with pytest.raises(ValueError, match="need texts to hide things in"):
        retrieval_samples(Letters(), [], 1, 600)
