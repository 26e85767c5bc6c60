"""Prompts, streamers and criteria for `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from adaskip_fx.plans.skip_plan import SkipPlan
from tests.support.compiled_llamas import (
    Entry,
)


def mixed_plan(bank: Entry) -> SkipPlan:
    """Something skipped in both phases, something in decode only, with factors."""
    return bank.plan(["0.attention"], ["1.ffn"], {"0.attention": 0.8, "1.ffn": 1.2})


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class LastTokenIn(StoppingCriteria):
    def __init__(self, tokens: set[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([row[-1].item() in self.tokens for row in input_ids])


LENGTHS = (7, 3)


def padded(bank: Entry, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    rows = [bank.tokens(1, n, seed + n) for n in LENGTHS]
    width = max(LENGTHS)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in LENGTHS])
    return ids, mask, rows


@contextmanager
def running_ahead(bank: Entry) -> Iterator[None]:
    before, bank.runtime.ahead = bank.runtime.ahead, True
    try:
        yield
    finally:
        bank.runtime.ahead = before


@contextmanager
def counted(bank: Entry) -> Iterator[list[int]]:
    """The number of new tokens of each forward of the compiled model meanwhile."""
    steps: list[int] = []
    inner = bank.runtime.step

    def step(input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        steps.append(input_ids.shape[1])
        return inner(input_ids, *rest)

    bank.runtime.step = step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        del bank.runtime.step
