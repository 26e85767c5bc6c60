"""Prompts that ask for something hidden in a long text, which plain text hardly ever tests.

A plan may keep perplexity and lose retrieval. These prompts, made of calibration texts, let a
search or a distillation see that; they are worded unlike those that evaluation asks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from adaskip_fx.calibration.tokenizer import Tokenizer

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
_ANSWER_WEIGHT = 0.5  # of a sample; the rest is spread over all its tokens


def retrieval_samples(
    tokenizer: Tokenizer,
    texts: Sequence[torch.Tensor],
    count: int,
    tokens: int,
    *,
    max_facts: int = 4,
    seed: int = 0,
) -> list[Sample]:
    """Return samples of `tokens` tokens, whose answers have half of the weight.

    Args:
        tokenizer: the model's.
        texts: token ids int64 [1, T] to hide things in.
        count: how many samples.
        tokens: of each sample.
        max_facts: how many facts are hidden in a sample at most; fewer where they would fill more
            than half of it. All are asked for.
        seed: of the random choices.

    Raises:
        ValueError: no texts, or too few tokens for the questions.
    """
    if not texts:
        raise ValueError("retrieval samples need texts to hide things in")
    rng = random.Random(seed)
    return [_sample(tokenizer, texts, tokens, rng.randint(1, max_facts), rng) for _ in range(count)]


def _sample(
    tokenizer: Tokenizer, texts: Sequence[torch.Tensor], tokens: int, facts: int, rng: random.Random
) -> Sample:
    triples = [_triple(tokenizer, rng) for _ in range(facts)]
    while len(triples) > 1 and 2 * _length(triples) > tokens:
        triples.pop()
    room = tokens - _length(triples)
    if room < 1:
        raise ValueError(f"{tokens} tokens are too few for a question; make samples longer")
    asked = rng.sample(triples, len(triples))
    ids = _stretch(texts, room, rng)
    positions = sorted((rng.randint(0, room) for _ in triples), reverse=True)
    for position, (fact, _, _) in zip(positions, triples, strict=True):
        ids[position:position] = fact
    is_answer = [False] * len(ids)
    for _, question, answer in asked:
        ids += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    # a token's weight is that of what is predicted there: the next one
    answers = torch.tensor([*is_answer[1:], False], dtype=torch.float32)
    weights = _ANSWER_WEIGHT * answers / answers.sum() + (1 - _ANSWER_WEIGHT) / len(ids)
    return Sample(torch.tensor([ids]).to(texts[0].device), weights)


def _length(triples: Sequence[tuple[list[int], ...]]) -> int:
    return sum(len(ids) for triple in triples for ids in triple)


def _triple(tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens of a fact, of the question for it, and of the answer."""
    fact, question = rng.choice(_FORMS)
    key = rng.choice(_WORDS) if "word of" in fact else str(rng.randrange(10**3, 10**7))
    names = {
        "thing": rng.choice(_THINGS),
        "person": rng.choice(_PEOPLE),
        "city": rng.choice(_CITIES),
        "word": rng.choice(_WORDS),
        "key": key,
    }

    def ids(text: str) -> list[int]:
        options = {"truncation": True, "max_length": 256, "return_tensors": "pt"}
        encoded = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return [int(token) for token in encoded[0]]

    return ids(fact.format(**names)), ids(question.format(**names)), ids(f" {key}")


def _stretch(texts: Sequence[torch.Tensor], tokens: int, rng: random.Random) -> list[int]:
    """Return so many tokens of one text from a random position on; it repeats where it ends."""
    text = rng.choice(texts)[0].tolist()
    start = rng.randrange(max(1, len(text) - tokens))
    repeated = text[start:] + text * (tokens // len(text) + 1)
    return repeated[:tokens]
