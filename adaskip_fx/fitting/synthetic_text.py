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

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.runtime import Runtime

from .oom_backoff import OomBackoff
from .seed_prompts import OPENINGS

_TEMPERATURES = (0.8, 1.0)
_LONGEST = 32  # tokens of an opening
_OPENED = 4  # texts that begin as documents do, for one that begins with a drawn token
_AFTER_FIRST = 0.5  # of drawn tokens come after the token that texts begin with, if there is one


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

    Of six, one begins with a drawn token, four with openings of documents of as many kinds, and one
    as the tokenizer's chat template begins, if it has one; then the model goes on by itself, beyond
    ends of texts, sampled at a temperature of 0.8 or 1.

    Args:
        runtime: of a compiled model; nothing is skipped while it writes.
        tokenizer: the model's.
        count: of texts.
        tokens: of each, at least 2.
        batch: rows that are written at once, or fewer where memory has no room for them.
        seed: of all that is drawn; torch's own generators are left alone.
        progress: called with (texts written, texts in all).
    """
    if count < 1 or tokens < 2:
        raise ValueError(f"write at least one text of two tokens, got {count} of {tokens}")
    drawn, beginnings = random.Random(seed), _beginnings(runtime.model, tokenizer, seed)
    chance = torch.Generator(runtime.device).manual_seed(seed)
    found: list[torch.Tensor] = []

    def write(rows: int) -> torch.Tensor:
        begun = [next(beginnings) for _ in range(min(rows, count - len(found)))]
        warmth = [[drawn.choice(_TEMPERATURES)] for _ in begun]
        temperatures = torch.tensor(warmth, device=runtime.device)
        return _continued(runtime, begun, tokens, temperatures, chance)

    room = OomBackoff(batch)
    while len(found) < count:
        if progress is not None:
            progress(len(found), count)
        found += torch.split(room(write), 1)
    if progress is not None:
        progress(count, count)
    return [ids.contiguous() for ids in found]


def _continued(
    runtime: Runtime,
    begun: Sequence[Sequence[int]],
    tokens: int,
    temperatures: torch.Tensor,
    chance: torch.Generator,
) -> torch.Tensor:
    """Texts int64 [rows, tokens] that begin so; temperatures: [rows, 1]."""
    longest = min(max(map(len, begun)), tokens)
    given = torch.tensor([[*row, *[-1] * longest][:longest] for row in begun])
    columns = torch.split(given.to(runtime.device), 1, dim=1)
    cache = runtime.new_cache(tokens, plan=SkipPlan.empty(runtime.sublayers))
    parts = [columns[0]]
    for place in range(1, tokens):
        logits = runtime.step(parts[-1].contiguous(), None, None, cache, 1)[:, -1].float()
        ids = torch.multinomial((logits / temperatures).softmax(-1), 1, generator=chance)
        if place < longest:
            ids = torch.where(columns[place] < 0, ids, columns[place])
        parts.append(ids)
    return torch.cat(parts, 1)


def _beginnings(model: Any, tokenizer: Any, seed: int) -> Iterator[list[int]]:
    """The tokens that texts begin with, at least one; each kind in turn."""
    drawn = random.Random(seed + 1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = getattr(tokenizer, "bos_token_id", None)
    chat = _chat_opening(tokenizer)
    while True:
        token = [drawn.randrange(vocabulary)]
        yield [first, *token] if first is not None and drawn.random() < _AFTER_FIRST else token
        for kind in drawn.sample(list(OPENINGS), _OPENED):
            yield _opening(tokenizer, drawn.choice(OPENINGS[kind])) or token
        if chat is not None:
            yield chat


def _opening(tokenizer: Any, text: str, **more: Any) -> list[int]:
    given = {"truncation": True, "max_length": _LONGEST, "return_tensors": "pt"}
    return [int(i) for i in torch.as_tensor(tokenizer(text, **given, **more)["input_ids"])[0]]


def _chat_opening(tokenizer: Any) -> list[int] | None:
    """The tokens before a user's first message; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\N{WHITE SQUARE}mark\N{WHITE SQUARE}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    before = str(text).split(mark)[0]
    return _opening(tokenizer, before, add_special_tokens=False) if before else None


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
