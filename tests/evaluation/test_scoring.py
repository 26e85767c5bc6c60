"""The four kinds of examples, put to a model that knows the answer and to one that does not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaskip_fx.evaluation.examples import Choose, Generate, Recall
from adaskip_fx.evaluation.scoring import chosen, logits_of, score
from tests.support.toy_models import VOCABULARY, Scripted, encoded, knows, says, tokenizer

PROMPT = encoded("What is it? ")


def test_generation_moves_with_the_model_and_stops() -> None:
    example = Generate(PROMPT, ("blue",), "exact", limit=20, stop="\n")
    perfect = score(knows(PROMPT + encoded(" blue\nWhat")), tokenizer(), example)
    assert perfect.score == 1
    assert perfect.text == "blue"
    broken = score(says("x"), tokenizer(), example)
    assert broken.score == 0
    assert broken.text == "x" * 20  # the limit
    long = Generate(PROMPT, ("blue",), "contains", limit=4)
    assert score(knows(PROMPT + encoded("is blue")), tokenizer(), long).score == 0


def test_recall_wants_every_token_of_the_answer() -> None:
    answer = encoded("12345")
    example = Recall(PROMPT, answer)
    assert score(knows(PROMPT + answer), tokenizer(), example).score == 1
    assert score(says("1"), tokenizer(), example).score == 0
    # the model would not go on from a wrong token, but it is given the right ones
    nearly = knows(PROMPT + encoded("1239"), PROMPT + encoded("12345"))
    assert score(nearly, tokenizer(), example).score == 0
    assert score(nearly, tokenizer(), Recall(PROMPT, encoded("123"))).score == 1


def test_recall_is_one_pass_that_asks_for_few_logits() -> None:
    model = knows(PROMPT * 10 + encoded("12345"))
    score(model, tokenizer(), Recall(PROMPT * 10, encoded("12345")))
    assert model.passes == [(10 * len(PROMPT) + 4, 5)]
    short = knows(PROMPT + encoded("12"))
    assert score(short, tokenizer(), Recall(PROMPT, encoded("12"))).score == 1
    assert short.passes == [(len(PROMPT) + 1, 2)]


def _biased(weights: dict[str, float]) -> Scripted:
    """After the prompt each character has its weight, whatever came before."""
    logits = torch.full((VOCABULARY,), -20.0)
    for character, weight in weights.items():
        logits[encoded(character)[0]] = math.log(weight)
    return Scripted(lambda ids: logits)


def test_the_likeliest_option_by_hand() -> None:
    model = _biased({"a": 0.5, "b": 0.3, "c": 0.2})
    one = Choose(PROMPT, (encoded("b"), encoded("a"), encoded("c")), right=1)
    assert score(model, tokenizer(), one).score == 1
    assert score(model, tokenizer(), Choose(PROMPT, one.options, right=0)).score == 0
    assert len(model.passes) == 2  # one for each question: options of one token share it
    # "aa" has 0.25, which is less than "b" has: a likelihood is not normalized by length
    mixed = Choose(PROMPT, (encoded("aa"), encoded("b")), right=1)
    assert chosen(model, mixed) == 1
    assert chosen(model, Choose(PROMPT, (encoded("aa"), encoded("c")), right=0)) == 0


def test_options_are_given_their_own_tokens() -> None:
    model = knows(PROMPT + encoded("loch"), PROMPT + encoded("loan"))
    options = (encoded("loan"), encoded("loch"), encoded("x"))
    assert chosen(model, Choose(PROMPT, options, 1)) == 1  # the first text is the one it prefers
    assert len(model.passes) == 2  # of those two; the option of one token needs none


def test_a_model_that_cannot_keep_some_logits_gives_all() -> None:
    class Whole:
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 7))

        __call__ = forward

    assert logits_of(Whole(), range(5), keep=2).shape == (5, 7)


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(KeyError, match="bleu"):
        score(says("x"), tokenizer(), Generate(PROMPT, ("x",), "bleu", limit=1))
