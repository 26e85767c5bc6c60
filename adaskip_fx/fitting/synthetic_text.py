"""Calibration texts that a model writes itself.

A linear map that is fitted on one kind of text does harm on another; what the model writes when
nothing is asked of it is as varied as what it was trained on, and no data is needed.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from adaskip_fx.calibration.tokenizer import Tokenizer
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.runtime import Runtime

from .oom_backoff import OomBackoff

_TEMPERATURES = (0.8, 1.0)
_PROMPT_TOKENS = 32  # of a prompt at most
_SEEDED = 4  # texts that begin as documents do, for one that begins with a random token
_AFTER_BOS = 0.5  # of random tokens follow the token that texts begin with, if there is one


@functools.cache
def seed_prompts() -> Mapping[str, Sequence[str]]:
    """Return how documents begin, by kind, for a model to go on from.

    A kind is chosen first, so that none is rarer for having few of them.
    """
    text = resources.files(__package__).joinpath("seed_prompts.json").read_text("utf-8")
    prompts: dict[str, list[str]] = json.loads(text)
    return prompts


@torch.no_grad()
def write_texts(
    runtime: Runtime,
    tokenizer: Tokenizer,
    count: int,
    tokens: int,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[torch.Tensor]:
    """Return texts as token ids, int64 [1, tokens] each.

    Of six, one begins with a random token, four with beginnings of documents of as many kinds, and
    one as the tokenizer's chat template begins, if it has one; then the model goes on by itself,
    beyond ends of texts, sampled at a temperature of 0.8 or 1.

    Args:
        runtime: of a compiled model; nothing is skipped while it writes.
        tokenizer: the model's.
        count: how many texts.
        tokens: of each text, at least 2.
        batch_size: rows that are written at once, or fewer where memory has no room for them.
        seed: of all random choices; torch's own generators are left alone.
        progress: called with (texts written, texts in all).

    Raises:
        ValueError: no text, or texts of one token.
    """
    if count < 1 or tokens < 2:
        raise ValueError(f"write at least one text of two tokens, got {count} of {tokens}")
    rng, prompts = random.Random(seed), _prompts(runtime.model, tokenizer, seed)
    generator = torch.Generator(runtime.device).manual_seed(seed)
    texts: list[torch.Tensor] = []

    def write(rows: int) -> torch.Tensor:
        batch = [next(prompts) for _ in range(min(rows, count - len(texts)))]
        column = [[rng.choice(_TEMPERATURES)] for _ in batch]
        temperatures = torch.tensor(column, device=runtime.device)
        return _generate(runtime, batch, tokens, temperatures, generator)

    backoff = OomBackoff(batch_size, runtime.ranks.alone)
    while len(texts) < count:
        if progress is not None:
            progress(len(texts), count)
        texts += torch.split(backoff(write), 1)
    if progress is not None:
        progress(count, count)
    return [ids.contiguous() for ids in texts]


def _generate(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperatures: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return texts int64 [rows, tokens] that begin with the prompts.

    Args:
        runtime: of a compiled model.
        prompts: token ids of each row, at least one.
        tokens: of a text; longer prompts are cut off.
        temperatures: [rows, 1].
        generator: of the samples.
    """
    longest = min(max(map(len, prompts)), tokens)
    padded = torch.tensor([[*row, *[-1] * longest][:longest] for row in prompts])
    columns = torch.split(padded.to(runtime.device), 1, dim=1)
    cache = runtime.new_cache(tokens, plan=SkipPlan.empty(runtime.sublayers))
    written = [columns[0]]
    for position in range(1, tokens):
        logits = runtime.step(written[-1].contiguous(), None, None, cache, 1)[:, -1].float()
        ids = torch.multinomial((logits / temperatures).softmax(-1), 1, generator=generator)
        if position < longest:
            ids = torch.where(columns[position] < 0, ids, columns[position])
        written.append(runtime.ranks.of_first(ids))
    return torch.cat(written, 1)


def _prompts(model: Any, tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Yield the tokens that texts begin with, at least one; each kind in turn."""
    rng = random.Random(seed + 1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    bos = getattr(tokenizer, "bos_token_id", None)
    chat = _chat_prompt(tokenizer)
    by_kind = seed_prompts()
    while True:
        token = [rng.randrange(vocabulary)]
        yield [bos, *token] if bos is not None and rng.random() < _AFTER_BOS else token
        for kind in rng.sample(list(by_kind), _SEEDED):
            yield _encode(tokenizer, rng.choice(by_kind[kind])) or token
        if chat is not None:
            yield chat


def _encode(tokenizer: Tokenizer, text: str, **more: Any) -> list[int]:
    options = {"truncation": True, "max_length": _PROMPT_TOKENS, "return_tensors": "pt"}
    ids = torch.as_tensor(tokenizer(text, **options, **more)["input_ids"])[0]
    return [int(token) for token in ids]


def _chat_prompt(tokenizer: Tokenizer) -> list[int] | None:
    """Return the tokens before a user's first message; None without a template."""
    if not hasattr(tokenizer, "apply_chat_template"):
        return None
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "\N{WHITE SQUARE}mark\N{WHITE SQUARE}"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    before = str(text).split(mark)[0]
    return _encode(tokenizer, before, add_special_tokens=False) if before else None
