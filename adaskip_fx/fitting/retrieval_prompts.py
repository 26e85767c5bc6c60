"""Prompts that ask for something hidden in a long text: what plain text hardly ever tests.

A plan may keep perplexity and lose retrieval. These prompts, made of calibration texts, let a
search or a refinement see that; they are worded unlike those that evaluation asks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from .weighted_sample import Sample

_THINGS = ("locker", "account", "parcel", "invoice", "flight", "box", "file", "order")
_PEOPLE = ("Anna", "Boris", "Chen", "Dana", "Emil", "Farah", "Hugo", "Ines", "Karim", "Olga")
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Riga", "Seoul", "Tunis", "Vienna", "Zagreb")
_WORDS = ("copper", "lantern", "meadow", "falcon", "harbor", "velvet", "cinder", "maple", "tundra",
          "orchid", "granite", "saffron", "willow", "glacier", "quartz", "thistle")  # fmt: skip
#: What is hidden, and how it is asked for; the answer follows.
_FORMS = (
    ("\n(Note: the {thing} of {person} has number {key}.)\n",
     "\nQuestion: which number has the {thing} of {person}?\nAnswer: the number is"),
    ("\nThe office in {city} has the code {key}. I repeat, {key} is the code for {city}.\n",
     "\nWhat was the code of the office in {city}? The code is"),
    (" {person}'s word of the day is {key}, do not forget it. ",
     "\nQ: What is {person}'s word of the day?\nA: It is"),
    ("\n{word}_limit = {key}\n", "\n# the value from above\n{word}_limit ="),
    ("\n{person} said: my combination is {key}. Write it down: {key}.\n",
     "\nWhich combination did {person} give? It was"),
)  # fmt: skip
_HALF = 0.5  # of the weight is on the answers, half on all tokens alike


def retrieval_samples(
    tokenizer: Any,
    texts: Sequence[torch.Tensor],
    count: int,
    tokens: int,
    *,
    most: int = 4,
    seed: int = 0,
) -> list[Sample]:
    """Samples of `tokens` tokens, whose answers have half of the weight.

    Args:
        tokenizer: the model's.
        texts: token ids int64 [1, T] to hide things in.
        count: of samples.
        tokens: of each.
        most: things hidden in one, at most, and as fit into half of it; all are asked for.
        seed: of all that is drawn.

    Raises:
        ValueError: no texts, or too few tokens for the questions.
    """
    if not texts:
        raise ValueError("retrieval samples need texts to hide things in")
    drawn = random.Random(seed)
    return [_sample(tokenizer, texts, tokens, drawn.randint(1, most), drawn) for _ in range(count)]


def _sample(
    tokenizer: Any, texts: Sequence[torch.Tensor], tokens: int, hidden: int, drawn: random.Random
) -> Sample:
    triples = [_triple(tokenizer, drawn) for _ in range(hidden)]
    while len(triples) > 1 and 2 * _length(triples) > tokens:
        triples.pop()
    room = tokens - _length(triples)
    if room < 1:
        raise ValueError(f"{tokens} tokens are too few for a question; make samples longer")
    asked = drawn.sample(triples, len(triples))
    tail = [(ids, part == 1) for _, *rest in asked for part, ids in enumerate(rest)]
    body = _stretch(texts, room, drawn)
    places = sorted((drawn.randint(0, room) for _ in triples), reverse=True)
    for place, (facts, *_) in zip(places, triples, strict=True):
        body[place:place] = facts
    answered = [False] * len(body) + [answer for ids, answer in tail for _ in ids]
    whole = [*body, *(one for ids, _ in tail for one in ids)]
    # a token's weight is that of what is predicted there: the next one
    answers = torch.tensor([*answered[1:], False], dtype=torch.float32)
    weights = _HALF * answers / answers.sum() + (1 - _HALF) / len(whole)
    return Sample(torch.tensor([whole]).to(texts[0].device), weights)


def _length(triples: Sequence[tuple[list[int], ...]]) -> int:
    return sum(len(ids) for triple in triples for ids in triple)


def _triple(tokenizer: Any, drawn: random.Random) -> tuple[list[int], list[int], list[int]]:
    fact, question = drawn.choice(_FORMS)
    key = drawn.choice(_WORDS) if "word of" in fact else str(drawn.randrange(10**3, 10**7))
    names = {
        "thing": drawn.choice(_THINGS),
        "person": drawn.choice(_PEOPLE),
        "city": drawn.choice(_CITIES),
        "word": drawn.choice(_WORDS),
        "key": key,
    }

    def ids(text: str) -> list[int]:
        given = {"truncation": True, "max_length": 256, "return_tensors": "pt"}
        found = tokenizer(text, add_special_tokens=False, **given)["input_ids"]
        return [int(one) for one in found[0]]

    return ids(fact.format(**names)), ids(question.format(**names)), ids(f" {key}")


def _stretch(texts: Sequence[torch.Tensor], tokens: int, drawn: random.Random) -> list[int]:
    """So many tokens of one text from a drawn place on, from its beginning again where it ends."""
    text = drawn.choice(texts)[0].tolist()
    start = drawn.randrange(max(1, len(text) - tokens))
    repeated = text[start:] + text * (tokens // len(text) + 1)
    return repeated[:tokens]
