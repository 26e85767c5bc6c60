"""Text to hide things in: paragraphs of a file, or of the Python reference's held-out half."""

from __future__ import annotations

import functools
import itertools
import random
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adaskip_fx.data.reference_text import halves
from adaskip_fx.utils.files import read_text

_LONGEST = 800  # characters of a paragraph


@functools.lru_cache(maxsize=4)
def paragraphs(path: Path | None) -> tuple[str, ...]:
    """Return the paragraphs of a UTF-8 text, those that are longer than 800 characters cut.

    Args:
        path: None for the half of ``pydoc_data.topics`` that calibration does not see.

    Raises:
        ValueError: the file is not text, or empty.
    """
    if path is None:
        # Long ones of the reference are grammars and tables.
        return tuple(p for p in halves()[1] if len(p) <= _LONGEST)
    parts = (part.strip("\n") for part in re.split(r"\n\s*\n", read_text(path)))
    found = [piece for part in parts if part.strip() for piece in _cut(part)]
    if not found:
        raise ValueError(f"{path}: no text in it")
    return tuple(found)


def _cut(paragraph: str) -> list[str]:
    if len(paragraph) <= _LONGEST:
        return [paragraph]
    return textwrap.wrap(paragraph, _LONGEST)


def shuffled_filler(path: Path | None, rng: random.Random) -> list[str]:
    """Return all paragraphs, in order from one that is drawn, around the end."""
    known = paragraphs(path)
    start = rng.randrange(len(known))
    return [*known[start:], *known[:start]]


@functools.lru_cache(maxsize=4)
def words(path: Path | None) -> tuple[str, ...]:
    """Return words of 4 to 8 small letters that occur in the paragraphs more than once, sorted."""
    counts = Counter(w for p in paragraphs(path) for w in re.findall(r"\b[a-z]{4,8}\b", p))
    return tuple(sorted(word for word, count in counts.items() if count > 1))


def hide(filler: Sequence[str], hidden: Sequence[str], depths: Sequence[float]) -> str:
    """Return paragraphs with each of `hidden` between those that are nearest to its depth.

    Args:
        filler: the paragraphs.
        hidden: what to put between them.
        depths: where each of `hidden` goes: 0 at the beginning, 1 at the end, counted in
            characters.
    """
    starts = [0, *itertools.accumulate(map(len, filler))]
    parts, done = list[str](), 0
    for depth, text in sorted(zip(depths, hidden, strict=True)):
        at = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * starts[-1]))
        parts += [*filler[done:at], text]
        done = at
    return "\n\n".join([*parts, *filler[done:]])
