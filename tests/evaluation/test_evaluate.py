"""`evaluate` on models that know, on models that do not, and on a compiled one beside its own."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from adaskip_fx.evaluation.evaluate import digest, evaluate
from adaskip_fx.evaluation.examples import Choose, Generate, Predict, Recall
from adaskip_fx.evaluation.execution_check import NotMeasuredError
from adaskip_fx.evaluation.task import TaskOptions
from adaskip_fx.evaluation.tasks import (
    Arithmetic,
    Brackets,
    CommonWords,
    DecodePerplexity,
    KeyValue,
    Needle,
    OwnSummary,
    Passkey,
    Perplexity,
    VariableTracking,
)
from tests.support.toy_models import compiled, encoded, knows, says, tokenizer


@dataclass(frozen=True, kw_only=True)
class TwoOptions(TaskOptions):
    """Choose between two words, by their likelihood."""

    name: ClassVar[str] = "two_options"
    metric: ClassVar[str] = "accuracy"

    def examples(self, tokenizer: Any) -> list[Choose]:
        return [Choose(encoded("a text"), (encoded("yes"), encoded("no")), 0)]


def answered(task: Any) -> list[tuple[int, ...]]:
    """Prompts with all their answers."""
    texts = []
    for example in task.examples(tokenizer()):
        if isinstance(example, Recall):
            texts.append(example.prompt + example.answer)
        else:
            assert isinstance(example, Generate)
            texts.append(example.prompt + encoded(" " + ", ".join(example.answers)))
    return texts


@pytest.mark.parametrize(
    "kind", [Passkey, Needle, VariableTracking, CommonWords, KeyValue, Arithmetic, Brackets]
)
def test_scores_move_from_one_to_nothing(kind: Any) -> None:
    task = kind(samples=3, length=1500)
    (good,) = evaluate(knows(*answered(task)), tokenizer(), [task], reference=says("!")).results
    assert good.scores.values == (1.0, 1.0, 1.0)
    assert (good.scores.mean, good.scores.error) == (1.0, 0.0)
    assert good.reference is not None
    assert good.reference.mean == 0
    half = evaluate(knows(*answered(task)[:1]), tokenizer(), [task])
    (some,) = half.results
    assert some.scores.values == (1.0, 0.0, 0.0)
    assert some.scores.mean == pytest.approx(1 / 3)
    assert some.scores.error == pytest.approx(1 / 3)
    assert some.reference is some.ran is some.kl is None


def test_a_report_has_all_that_it_takes_to_repeat_it(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("a text of its own\n\n" * 100)
    tasks = [Perplexity(samples=2, length=50, path=file, edges=(20,)), Passkey(samples=1, seed=5)]
    told: list[tuple[int, int]] = []
    found = evaluate(
        says("a"), tokenizer(), tasks, about={"alpha": 1.2}, progress=lambda *at: told.append(at)
    )
    assert told == [(0, 3), (1, 3), (2, 3)]
    report = json.loads(json.dumps(found.to_json()))
    assert report["schema"] == 1
    conditions = report["conditions"]
    assert conditions["alpha"] == 1.2
    assert conditions["torch"] == torch.__version__
    assert {"transformers", "adaskip_fx", "python", "device", "dtype"} <= set(conditions)
    assert conditions["plan"] is None
    first, second = report["results"]
    assert first["files"] == {"own.txt": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert first["options"] == {
        "samples": 2,
        "length": 50,
        "seed": 0,
        "path": "own.txt",
        "edges": [20],
    }
    assert [(b["first"], b["last"], b["tokens"]) for b in first["buckets"]] == [
        (0, 20, 38),
        (20, None, 60),
    ]
    assert (first["n"], second["n"]) == (2, 1)
    assert second["standard_error"] is None
    assert second["options"]["seed"] == 5
    assert second["examples_sha256"] == digest(tasks[1].examples(tokenizer()))
    assert second["files"] == {}
    assert [r.title for r in found.results] == ["perplexity (own.txt)", "passkey"]


def test_digests_see_every_part_of_an_example() -> None:
    examples = [
        Recall((1, 2), (3,)),
        Recall((1,), (2, 3)),
        Predict((1, 2, 3)),
        Generate((1, 2), ("3",), "f1", 4),
        Generate((1, 2), ("3",), "exact", 4),
    ]
    digests = {digest([e]) for e in examples}
    assert len(digests) == len(examples)
    assert digest(examples) not in digests


def test_perplexity_is_what_the_models_own_loss_says() -> None:
    subject = compiled()
    task = Perplexity(samples=3, length=120, edges=(40, 80))
    (found,) = evaluate(subject.model, tokenizer(), [task]).results
    losses = []
    for example in task.examples(tokenizer()):
        ids = torch.tensor([example.tokens])
        with torch.no_grad():
            losses.append(float(subject.model(input_ids=ids, labels=ids).loss))
    assert found.scores.values == pytest.approx(losses, rel=1e-5)
    assert found.scores.mean == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert found.metric == "perplexity"


def test_decode_perplexity_is_of_decode_steps() -> None:
    """The same numbers as one pass gives, where nothing is skipped; and the decode plan's."""
    subject = compiled()
    task = DecodePerplexity(samples=2, length=60, steps=30, edges=(11,))
    losses = []
    for example in task.examples(tokenizer()):
        ids = torch.tensor([example.tokens])
        labels = ids.clone()
        labels[:, :-30] = -100  # not counted
        with torch.no_grad():
            losses.append(float(subject.model(input_ids=ids, labels=labels).loss))
    for model in (subject.model, subject.fast):
        (found,) = evaluate(model, tokenizer(), [task]).results
        assert found.scores.values == pytest.approx(losses, rel=1e-4)
        assert [(b.first, b.tokens) for b in found.buckets] == [(0, 20), (11, 40)]
    # what only decoding skips is seen here
    with subject.using(decode_extra=["1.ffn"]) as fast:
        (stepped,) = evaluate(fast, tokenizer(), [task], reference=subject.model).results
    assert stepped.kl is not None
    assert stepped.kl > 1e-3
    assert stepped.ran is not None
    assert stepped.ran.prefill.tokens == 2 * 29
    assert stepped.ran.decode.tokens == 2 * 30
    assert (stepped.ran.prefill.fraction, stepped.ran.decode.fraction) == (0, 0.25)


@pytest.mark.parametrize(
    ("task", "prompts"),
    [
        (Perplexity(samples=3, length=60), 3),
        (Passkey(samples=2, length=500), 2),  # its answer's tokens are given
        (TwoOptions(), 2),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_likelihoods_say_nothing_of_a_plan_for_decoding(task: Any, prompts: int) -> None:
    """They would be the full model's; a plan that prompts see as well is measured by them."""
    subject = compiled()
    with subject.using(decode_extra=["1.ffn"]) as fast, pytest.raises(NotMeasuredError) as caught:
        evaluate(fast, tokenizer(), [task])
    assert str(caught.value) == (
        f"the task {task.name} ran {prompts} prompts and 0 decode steps, and nothing was left out "
        "in any of them: the plan leaves out 1.ffn in decode. What was measured is the full model. "
        "Choose a task that runs such steps (one that generates its answers, or "
        "decode_perplexity), or another plan"
    )
    with subject.using("1.ffn") as fast:
        (found,) = evaluate(fast, tokenizer(), [task]).results
    assert found.ran is not None
    assert found.ran.prefill.fraction == 0.25
    (full,) = evaluate(subject.fast, tokenizer(), [task]).results  # nothing was to be left out
    assert full.ran is not None
    assert full.ran.prefill.fraction == 0


def test_generated_answers_measure_a_plan_for_decoding() -> None:
    with compiled().using(decode_extra=["1.ffn"]) as fast:
        task = Passkey(samples=1, length=500, forced=False)
        (found,) = evaluate(fast, tokenizer(), [task]).results
    assert found.ran is not None
    assert found.ran.decode.steps > 0
    assert (found.ran.prefill.fraction, found.ran.decode.fraction) == (0, 0.25)


def test_a_compiled_model_beside_its_own() -> None:
    subject = compiled()
    tasks = [
        Perplexity(samples=2, length=120, edges=(60,)),
        Passkey(samples=2, length=500, forced=False),
    ]
    same = evaluate(subject.fast, tokenizer(), tasks, reference=subject.model)
    with subject.using("0.attention", decode_extra=["1.ffn"]) as fast:
        other = evaluate(fast, tokenizer(), tasks, reference=subject.model)
        plan = subject.runtime.plan
    for skipped, found in ((False, same), (True, other)):
        predicted, asked = found.results
        assert predicted.kl is not None
        assert predicted.reference is not None
        assert predicted.ran is not None
        assert asked.ran is not None
        assert (predicted.kl > 1e-3) == skipped
        ratio = predicted.scores.mean / predicted.reference.mean
        assert (abs(ratio - 1) > 1e-3) == skipped
        assert predicted.ran.prefill.fraction == (0.25 if skipped else 0)
        assert predicted.ran.prefill.tokens == 240
        assert predicted.ran.decode.tokens == 0
        assert asked.ran.prefill.steps == 2
        assert asked.ran.decode.fraction == (0.5 if skipped else 0)
        assert len(asked.answers) == 2
    assert other.conditions["plan"] == plan.to_json()
    assert other.conditions["backend"] == "eager"
    json.dumps(other.to_json())


def test_what_the_reference_says_is_right_where_nobody_else_says_it() -> None:
    pytest.importorskip("rouge_score")
    task = OwnSummary(samples=2, length=900)
    examples = task.examples(tokenizer())
    texts = ["one two three four", "five six seven eight"]
    full = knows(*(e.prompt + encoded(t) for e, t in zip(examples, texts, strict=True)))
    half = knows(examples[0].prompt + encoded("one two"), examples[1].prompt + encoded("nine"))
    (found,) = evaluate(half, tokenizer(), [task], reference=full).results
    # of "one two" all is right, and it is half of what the reference said: F = 2/3
    assert found.scores.values == pytest.approx((2 / 3, 0.0))
    assert found.answers == ("one two", "nine")
    assert found.reference is not None
    assert found.reference.values == (1.0, 1.0)
    assert all(len(e.prompt) <= 900 for e in examples)
    with pytest.raises(ValueError, match="compares with what a reference model says, and there is"):
        evaluate(half, tokenizer(), [task])


def test_what_cannot_be_evaluated() -> None:
    model = says("a")
    with pytest.raises(ValueError, match="the reference is the model itself"):
        evaluate(model, tokenizer(), [Passkey()], reference=model)

    class Nothing:
        name, metric = "nothing", "accuracy"

        def examples(self, tokenizer: Any) -> list[Recall]:
            return []

    with pytest.raises(ValueError, match="the task nothing has no example with these options"):
        evaluate(model, tokenizer(), [Passkey(), Nothing()])
    assert model.passes == []  # before anything is run
