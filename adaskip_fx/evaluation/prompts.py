"""Prompts of a given length, with as much filler text as fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaskip_fx.data.reference_text import prompt_ids

from .examples import Example, Generate, Recall, Tokens


def longest_prompt(
    build: Callable[[int], Tokens], most: int, length: int, task: str
) -> tuple[int, Tokens]:
    """Find the most filler with which a prompt has at most `length` tokens.

    Args:
        build: the prompt with that many units of filler; more filler never makes it shorter.
        most: units that there are.
        length: tokens of the prompt at most.
        task: for the message.

    Returns:
        How many units, and the prompt's tokens.

    Raises:
        ValueError: the prompt is too long with nothing in it.
    """
    low, prompt = 0, build(0)
    if len(prompt) > length:
        raise ValueError(
            f"a prompt of the task {task} has at least {len(prompt)} tokens, more than the "
            f"{length} allowed; raise length (--max-length)"
        )
    high = 1  # doubled first: units may be many, and a long prompt is slow to tokenize
    while high <= most and len(longer := build(high)) <= length:
        low, prompt, high = high, longer, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if len(longer := build(middle)) <= length:
            low, prompt = middle, longer
        else:
            high = middle
    return low, prompt


def message(tokenizer: Any, text: str, opening: str = "") -> Tokens:
    """Return the tokens of a user's message and of how the answer begins; see `prompt_ids`."""
    return tuple(prompt_ids(tokenizer, text, opening))


def plain(tokenizer: Any, text: str) -> Tokens:
    """Return the tokens of a text that a model is to continue, without a chat template."""
    return tuple(tokenizer(text, verbose=False)["input_ids"])


def continuation(tokenizer: Any, whole: Tokens, prompt: Tokens, text: str) -> Tokens:
    """Return the tokens of an answer after its prompt.

    Args:
        tokenizer: the model's.
        whole: prompt and answer, tokenized at once.
        prompt: what the answer continues.
        text: the answer alone, for tokenizers that would merge it with the prompt's last token.
    """
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return whole[len(prompt) :]
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def ask(
    tokenizer: Any, prompt: Tokens, text: str, opening: str, answer: str, forced: bool
) -> Example:
    """Return the question for one exact answer after `opening`.

    Args:
        tokenizer: the model's.
        prompt: tokens of `text` and `opening`.
        text: the message.
        opening: how the answer begins.
        answer: what is to follow.
        forced: whether the model is given the answer's own tokens (`Recall`), or generates.
    """
    whole = message(tokenizer, text, f"{opening} {answer}")
    tokens = continuation(tokenizer, whole, prompt, f" {answer}")
    if forced:
        return Recall(prompt, tokens)
    return Generate(prompt, (answer,), "contains", limit=len(tokens) + 4)
