"""The Python reference that every CPython carries, cut in two: what the demo reads.

One half of its topics is for calibration; passkey texts and held-out text come from the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 800  # characters of a paragraph; longer ones (grammars, tables) are left out
_LETTERS_PER_TOKEN = 6  # more than any usual tokenizer takes

# A "pass key" or a "secret word" would be taken for something of Python in these texts.
INSTRUCTION = "There is an important secret number hidden in the text. Find it and memorize it.\n"
NEEDLE = "The secret number is {key}. Remember it. {key} is the secret number."
QUESTION = "\nWhat is the secret number? Answer with the number."
OPENING = "The secret number is"  # of the answer: small models do not find a way into it


@dataclass(frozen=True)
class Passkey:
    """One long prompt with a pass key hidden in it.

    Attributes:
        ids: tokens, as the model gets them.
        key: what must appear in the answer.
        depth: where it is hidden, from 0 (at the beginning) to 1.
    """

    ids: tuple[int, ...]
    key: str
    depth: float


@dataclass(frozen=True)
class Texts:
    """All texts of one demo.

    Attributes:
        calibration: texts, one a sample.
        passkeys: long prompts.
        held_out: windows of tokens for perplexity and agreement.
    """

    calibration: tuple[str, ...]
    passkeys: tuple[Passkey, ...]
    held_out: tuple[tuple[int, ...], ...]


def halves() -> tuple[list[str], list[str]]:
    """Return the paragraphs of ``pydoc_data.topics`` for calibration, and those held out.

    Topics go to the two halves in turn. A paragraph that several topics share counts once, so
    the halves have none in common.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            text = paragraph.strip("\n")
            if text.strip() and text not in seen:
                seen.add(text)
                parts[number % 2].append(text)
    return parts


def calibration_samples(
    texts: Sequence[str] | None, max_length: int, count: int | None
) -> list[str]:
    """Return texts of about `max_length` tokens or more, one a sample.

    Args:
        texts: long texts to cut up; None for the calibration half of ``pydoc_data.topics``.
        max_length: tokens of a sample.
        count: samples at most, spread evenly over what there is; None for all.
    """
    sources = ["\n\n".join(halves()[0])] if texts is None else texts
    size = max_length * _LETTERS_PER_TOKEN
    samples = []
    for source in sources:
        cuts = [source[i : i + size] for i in range(0, len(source), size)]
        # What is left at the end would be a short sample, unless it is all there is.
        samples += [cut for cut in cuts if len(cut) == size] or cuts
    if count is None or count >= len(samples):
        return samples
    return [samples[i * len(samples) // count] for i in range(count)]


def demo_texts(
    tokenizer: Any,
    *,
    calibration: tuple[int, int],
    prompts: int,
    prompt_tokens: int,
    held_out: tuple[int, int],
    seed: int,
) -> Texts:
    """Draw a demo's texts.

    Args:
        tokenizer: the model's.
        calibration: samples, and tokens of each.
        prompts: how many passkey texts.
        prompt_tokens: the least number of tokens of each.
        held_out: windows, and tokens of each.
        seed: draws the pass keys, and which paragraphs each text has.

    Raises:
        ValueError: there is not enough text.
    """
    rng = random.Random(seed)
    samples, sample_tokens = calibration
    windows, window_tokens = held_out
    paragraphs = [p for p in halves()[1] if len(p) <= _LONGEST]
    start = rng.randrange(len(paragraphs))
    supply = iter(paragraphs[start:] + paragraphs[:start])
    count = _counter(tokenizer)
    texts = tuple(
        _window(tokenizer, _take(supply, window_tokens, count), window_tokens)
        for _ in range(windows)
    )
    passkeys = tuple(
        _passkey(
            tokenizer,
            _take(supply, prompt_tokens, count),
            key=str(rng.randrange(10_000, 100_000)),
            depth=(2 * i + 1) / (2 * prompts),
        )
        for i in range(prompts)
    )
    chosen = calibration_samples(None, sample_tokens, samples)
    return Texts(tuple(chosen), passkeys, texts)


def _counter(tokenizer: Any) -> Callable[[str], int]:
    def count(text: str) -> int:
        return len(tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"])

    return count


def _take(supply: Iterator[str], tokens: int, count: Callable[[str], int]) -> list[str]:
    """Return the next paragraphs, until they have `tokens` tokens."""
    taken, total = [], 0
    while total < tokens:
        paragraph = next(supply, None)
        if paragraph is None:
            raise ValueError("pydoc_data.topics is too short for that many and that long texts")
        taken.append(paragraph)
        total += count(paragraph)
    return taken


def _window(tokenizer: Any, paragraphs: list[str], tokens: int) -> tuple[int, ...]:
    return tuple(tokenizer("\n\n".join(paragraphs))["input_ids"][:tokens])


def _passkey(tokenizer: Any, paragraphs: list[str], key: str, depth: float) -> Passkey:
    at = round(depth * len(paragraphs))
    hidden = [*paragraphs[:at], NEEDLE.format(key=key), *paragraphs[at:]]
    text = INSTRUCTION + "\n\n".join(hidden) + QUESTION
    return Passkey(tuple(prompt_ids(tokenizer, text, opening=OPENING)), key, depth)


def prompt_ids(tokenizer: Any, text: str, opening: str = "") -> list[int]:
    """Return tokens of a user's message, by the tokenizer's chat template if it has one.

    Args:
        tokenizer: the model's.
        text: the message.
        opening: words that the answer begins with.
    """
    if getattr(tokenizer, "chat_template", None):
        # A text, not tokens: what tokens come as differs between versions of transformers.
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered + opening, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(f"{text} {opening}" if opening else text)["input_ids"]
    return list(ids)
