"""Prompts far from what a plan was calibrated on: noise, and scripts that the texts do not have."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping

#: Letters of scripts by the numbers of their first and last character.
_SCRIPTS = ((0x3B1, 0x3C9), (0x430, 0x44F), (0x5D0, 0x5EA), (0x905, 0x939), (0x4E00, 0x9FA5))


def _random_bytes(draw: random.Random, characters: int) -> str:
    """Characters of one byte that mean nothing together."""
    return "".join(chr(draw.randrange(33, 127)) for _ in range(characters))


def _another_script(draw: random.Random, characters: int) -> str:
    """Words of letters of one script, in no language."""
    first, last = draw.choice(_SCRIPTS)
    text = ""
    while len(text) < characters // 4:  # (a letter is several tokens)
        text += "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(2, 9))) + " "
    return text


def _code_noise(draw: random.Random, characters: int) -> str:
    """Names, numbers and signs of a program in no order."""
    parts = (*"(){}[]<>=+-*/%&|^!~:;,.?@#$\\", "->", "=>", "::", "0x", "//", "\n", "\t")
    text = ""
    while len(text) < characters:
        letters = "".join(draw.choices(string.ascii_letters + string.digits, k=draw.randint(1, 9)))
        text += draw.choice((letters, draw.choice(parts), draw.choice(parts)))
    return text


#: What makes a prompt of about so many characters, by the name of its kind.
KINDS: Mapping[str, Callable[[random.Random, int], str]] = {
    "random characters": _random_bytes,
    "another script": _another_script,
    "code noise": _code_noise,
}


def prompts(name: str, count: int, characters: int) -> list[str]:
    """Return prompts of a kind, the same ones every time."""
    draw = random.Random(name)
    return [f"{KINDS[name](draw, characters)}\n\nGo on like this." for _ in range(count)]
