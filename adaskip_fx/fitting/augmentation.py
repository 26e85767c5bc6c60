"""Make long and varied samples of texts that a model wrote: other layouts, and packing."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence

import torch

from adaskip_fx.calibration.tokenizer import Tokenizer


def vary_layouts(
    texts: Sequence[torch.Tensor], tokenizer: Tokenizer, seed: int
) -> list[torch.Tensor]:
    """Return texts in random layouts; as they are where the tokenizer cannot decode.

    Args:
        texts: token ids int64 [1, T].
        tokenizer: the model's.
        seed: of the random choices.
    """
    if not hasattr(tokenizer, "decode"):
        return list(texts)
    rng = random.Random(seed)
    varied = []
    for text in texts:
        words = vary_layout(tokenizer.decode(text[0]), rng)
        ids = tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"]
        varied.append(torch.as_tensor(ids).to(text.device))
    return varied


def vary_layout(text: str, rng: random.Random) -> str:
    """Return a text in another layout, or, one time in four, as it is.

    What a model writes looks alike: lines without end. Books are wrapped, mail is quoted, headings
    are in capitals; maps that are fitted on one layout do harm on others.
    """
    choice = rng.random()
    if choice < 0.25:
        return text
    if choice < 0.70:
        return _wrapped(text, rng.randint(45, 90), rng.choice(("\n", "\n\n")))
    if choice < 0.80:
        return text.lower()
    if choice < 0.87:
        return text.upper()
    mark = rng.choice(("    ", "> ", "\t", "# ", "// "))
    return _wrapped(text, rng.randint(50, 80), "\n", mark)


def pack(
    texts: Sequence[torch.Tensor], tokens: int, *, interleaved: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    """Return long samples of several short texts, int64 [1, tokens] each.

    Args:
        texts: token ids int64 [1, T].
        tokens: of a sample; what is left over at the end is dropped.
        interleaved: whether the beginnings of a sample's texts come first and then their ends, in
            another order, so that what is to be said depends on what was said long before.
        seed: of the order.
    """
    rows = [text[0] for text in texts]
    if not interleaved:
        pieces = torch.split(torch.cat(rows), tokens)
        return [piece.unsqueeze(0) for piece in pieces if len(piece) == tokens]
    rng, samples, waiting = random.Random(seed), list[torch.Tensor](), list[torch.Tensor]()
    for row in rows:
        waiting.append(row)
        if sum(map(len, waiting)) >= tokens:
            ends = [w[len(w) // 2 :] for w in rng.sample(waiting, len(waiting))]
            beginnings = [w[: len(w) // 2] for w in waiting]
            samples.append(torch.cat([*beginnings, *ends])[:tokens].unsqueeze(0))
            waiting = []
    return samples


def _wrapped(text: str, width: int, end: str, mark: str = "") -> str:
    paragraphs = (
        textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
        for line in text.split("\n")
    )
    return end.join(mark + line for paragraph in paragraphs for line in paragraph)
