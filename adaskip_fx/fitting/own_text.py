"""Calibration texts that a model writes itself.

A linear map that is fitted on one kind of text does harm on another; what the model writes when
nothing is asked of it is as varied as what it was trained on, and no data is needed.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from adaskip_fx.plan import SkipPlan
from adaskip_fx.runtime import Runtime

#: How texts begin that begin neither with a drawn token nor as a chat does.
_OPENINGS = (
    *("The ", "In 19", "Once upon a time", "Chapter 1\n", "Dear ", "Q: ", "He ", "It was ", "On "),
    *("def ", "import ", "class ", "#include <", "function ", "<html>", "{\n", "# ", "| ", "1. "),
    *("El ", "La ", "Le ", "Der ", "Die ", "Il ", "Abstract\n", '"', "- "),
)
_TEMPERATURES = (0.8, 1.0)


@torch.no_grad()
def write_texts(
    runtime: Runtime,
    tokenizer: Any,
    count: int,
    tokens: int,
    *,
    batch: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Texts as token ids, int64 [1, tokens] each.

    A third begins with a drawn token, a third with the opening of a document, and a third as the
    tokenizer's chat template begins, if it has one; then the model goes on by itself, beyond ends
    of texts, sampled at a temperature of 0.8 or 1.

    Args:
        runtime: of a compiled model; nothing is skipped while it writes.
        tokenizer: the model's.
        count: of texts.
        tokens: of each, at least 2.
        batch: rows that are written at once.
        seed: of all that is drawn; torch's own generators are left alone.
        progress: called with (texts written, texts in all).
    """
    if count < 1 or tokens < 2:
        raise ValueError(f"write at least one text of two tokens, got {count} of {tokens}")
    drawn, beginnings = random.Random(seed), _beginnings(runtime.model, tokenizer, seed)
    chance = torch.Generator(runtime.device).manual_seed(seed)
    found: list[torch.Tensor] = []
    while len(found) < count:
        if progress is not None:
            progress(len(found), count)
        rows = min(batch, count - len(found))
        begun = next(beginnings)(rows)[:, : tokens - 1].to(runtime.device)
        written = _continued(runtime, begun, tokens, drawn.choice(_TEMPERATURES), chance)
        found += torch.split(written, 1)
    if progress is not None:
        progress(count, count)
    return [ids.contiguous() for ids in found]


def _continued(
    runtime: Runtime,
    begun: torch.Tensor,
    tokens: int,
    temperature: float,
    chance: torch.Generator,
) -> torch.Tensor:
    cache = runtime.new_cache(tokens, plan=SkipPlan.empty(runtime.sublayers))
    ids, parts = begun.contiguous(), [begun]
    for _ in range(tokens - begun.shape[1]):
        logits = runtime.step(ids, None, None, cache, 1)[:, -1].float()
        ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=chance)
        parts.append(ids)
    return torch.cat(parts, 1)


def _beginnings(model: Any, tokenizer: Any, seed: int) -> Iterator[Callable[[int], torch.Tensor]]:
    """Functions from a number of rows to how they begin, int64 [rows, n]; each kind in turn."""
    drawn = random.Random(seed + 1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = getattr(tokenizer, "bos_token_id", None)

    def tokens(rows: int) -> torch.Tensor:
        ids = [[drawn.randrange(vocabulary)] for _ in range(rows)]
        return torch.tensor([[first, *row] if first is not None else [0, *row] for row in ids])

    def opening(rows: int) -> torch.Tensor:
        given = {"truncation": True, "max_length": 32, "return_tensors": "pt"}
        ids = tokenizer(drawn.choice(_OPENINGS), **given)["input_ids"]
        return torch.as_tensor(ids).expand(rows, -1)

    kinds = [tokens, opening]
    template = _chat_opening(tokenizer)
    if template is not None:
        kinds.append(lambda rows: template.expand(rows, -1))
    while True:
        yield from kinds


def _chat_opening(tokenizer: Any) -> torch.Tensor | None:
    """The tokens before a user's first message, int64 [1, some]; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\N{WHITE SQUARE}mark\N{WHITE SQUARE}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    before = str(text).split(mark)[0]
    if not before:
        return None
    ids = tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return torch.as_tensor(ids)


def pack(
    texts: Sequence[torch.Tensor], tokens: int, *, interleaved: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    """Long samples of several short texts, int64 [1, tokens] each.

    Args:
        texts: token ids int64 [1, T].
        tokens: of a sample; what is left over at the end is dropped.
        interleaved: the beginnings of a sample's texts come first and then their ends, in another
            order, so that what is to be said depends on what was said long before.
        seed: of the order.
    """
    rows = [text[0] for text in texts]
    if not interleaved:
        parts = torch.split(torch.cat(rows), tokens)
        return [part.unsqueeze(0) for part in parts if len(part) == tokens]
    drawn, found, waiting = random.Random(seed), list[torch.Tensor](), list[torch.Tensor]()
    for row in rows:
        waiting.append(row)
        if sum(map(len, waiting)) >= tokens:
            ends = [one[len(one) // 2 :] for one in drawn.sample(waiting, len(waiting))]
            whole = torch.cat([*(one[: len(one) // 2] for one in waiting), *ends])
            found.append(whole[:tokens].unsqueeze(0))
            waiting = []
    return found


def laid_out(text: str, drawn: random.Random) -> str:
    """A text in another layout, or, of one in four, as it is.

    What a model writes looks alike: lines without end. Books are wrapped, mail is quoted, headings
    are in capitals; maps that are fitted on one layout do harm on others.
    """
    way = drawn.random()
    if way < 0.25:
        return text
    if way < 0.70:
        return _wrapped(text, drawn.randint(45, 90), drawn.choice(("\n", "\n\n")))
    if way < 0.80:
        return text.lower()
    if way < 0.87:
        return text.upper()
    mark = drawn.choice(("    ", "> ", "\t", "# ", "// "))
    return _wrapped(text, drawn.randint(50, 80), "\n", mark)


def _wrapped(text: str, width: int, end: str, mark: str = "") -> str:
    lines = (
        textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
        for line in text.split("\n")
    )
    return end.join(mark + piece for line in lines for piece in line)
