"""Windows from texts: what is asked, what is chosen, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import adaskip_fx
from adaskip_fx.api import build
from adaskip_fx.fitting import WindowRecipe, choose_windows
from adaskip_fx.fitting.choose_windows import answerable_questions
from adaskip_fx.fitting.retrieval_prompts import retrieval_samples
from adaskip_fx.measurement.measure import measure
from adaskip_fx.plans.skip_plan import Phase, SkipPlan
from adaskip_fx.plans.windows import Window
from tests.support.compiled_llamas import make_model
from tests.support.recipe_tokenizers import Letters

MODEL = make_model("three_layers")
TEXTS = {
    "one": [
        torch.randint(0, 61, (1, 300), generator=torch.Generator().manual_seed(n)) for n in range(2)
    ]
}
QUICK = WindowRecipe(max_length=300, questions=2, shortlist=2)
WINDOW = Window(20, 4)


def read(plan: SkipPlan, context: int = 300) -> float:
    """The share of all keys and values that a step reads, head by head."""
    total = 0
    for layer in range(3):
        window = plan.windows.decode.get(adaskip_fx.Sublayer(layer, "attention"))
        for head in range(2):
            narrow = window is not None and head not in window.full_heads
            total += 24 if narrow else context
    return total / (6 * context)


@pytest.mark.parametrize(
    ("alpha", "per"),
    [
        *((1.0, "layer"), (2.5, "layer"), (1.3, "head"), (12.0, "head")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1.0, "head"), (2.5, "head"), (1.3, "layer"), (12.0, "layer"))
        ),
    ],
)
def test_as_much_as_asked_for(per: Any, alpha: float) -> None:
    said = list[str]()
    recipe = dataclasses.replace(QUICK, per=per)
    plan = choose_windows(MODEL, Letters(), TEXTS, alpha, WINDOW, recipe, say=said.append)
    assert not plan.decode
    assert plan.windows.prefill == plan.windows.decode
    assert 1 / read(plan) >= alpha
    if per == "layer":
        assert all(not window.full_heads for window in plan.windows.decode.values())
    assert said[:2] == ["questions", "search"]
    assert "plans judged; KL of texts" in said[2]


@pytest.mark.slow
def test_the_start_decides_the_number_of_steps() -> None:
    """Nearly all windows are reached from windows everywhere, few from none: both judge little."""

    def judged(alpha: float, start: Any) -> int:
        said = list[str]()
        recipe = dataclasses.replace(QUICK, start=start)
        choose_windows(MODEL, Letters(), TEXTS, alpha, WINDOW, recipe, say=said.append)
        return int(said[2].split()[0])

    assert judged(1.15, None) == judged(1.15, "full") < judged(1.15, "windowed")
    assert judged(4.0, None) == judged(4.0, "windowed") < judged(4.0, "full")


def test_questions_are_those_that_the_model_answers_best() -> None:
    """Of four times as many, by the likelihood of the answers under the eager model."""
    compiled = build(MODEL, None, backend="eager")
    texts = TEXTS["one"]
    asked = answerable_questions(compiled, Letters(), texts, 2, 200, 5)
    likely = []
    for sample in retrieval_samples(Letters(), texts, 8, 200, max_facts=1, seed=5):
        ids, weights = sample.ids[0], sample.weights
        places = (weights > 2 * weights.min()).nonzero()[:, 0]  # where an answer's token is next
        with torch.no_grad():
            found = MODEL(input_ids=sample.ids).logits[0].double().log_softmax(-1)
        score = float(found[places, ids[places + 1]].mean())
        likely.append((score, sample.ids, ids[places + 1]))
    best = sorted(likely, key=lambda entry: -entry[0])[:2]
    for prompt, answer in asked:
        whole = torch.cat((prompt, answer), 1)
        assert any(torch.equal(whole, ids) and torch.equal(answer[0], a) for _, ids, a in best)
    assert len(asked) == 2
    assert answerable_questions(compiled, Letters(), texts, 0, 200, 5) == []


def test_by_predicted_time() -> None:
    def seconds(phase: Phase, context: int, plan: SkipPlan) -> float:
        left_out = sum(s.kind == "attention" for s in plan.skipped("decode"))
        return 1.0 + read(plan, context) - left_out / 3

    compiled = build(MODEL, None, backend="eager")
    table = measure(compiled, (300,), time_step=seconds, windows=[WINDOW], rounds=1)
    recipe = dataclasses.replace(QUICK, table=table, per="layer")
    plan = choose_windows(MODEL, Letters(), TEXTS, 1.2, WINDOW, recipe)
    assert 2.0 / (1.0 + read(plan)) >= 1.2
    assert len(plan.windows.decode) == 2, "one layer gives 1.18"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="sees all of the longest text, which has 300 tokens"):
        choose_windows(MODEL, Letters(), TEXTS, 1.2, Window(296, 4), QUICK)
    with pytest.raises(ValueError, match="give at least one text of each kind"):
        choose_windows(MODEL, Letters(), {}, 1.2, WINDOW, QUICK)
    with pytest.raises(ValueError, match=r"alpha must be from 1 to 12\.5"):
        choose_windows(MODEL, Letters(), TEXTS, 13.0, WINDOW, QUICK)
