"""Decisions of several plans, and what they must do, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adaskip_fx.plans.decisions import Decision
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from tests.support.compiled_llamas import (
    Entry,
    follow,
    stored,
)
from tests.support.eager_reference import assert_close

SHAPE = "three_layers"


NAMES = [f"{i}.{kind}" for i in range(3) for kind in ("attention", "ffn")]


SUBLAYERS = tuple(map(Sublayer.parse, NAMES))


EMPTY = SkipPlan.empty(SUBLAYERS)


class Reference:
    """The oracle beside a request of any decision; it counts decoded tokens for itself."""

    def __init__(self, bank: Entry, at: Callable[[int], SkipPlan]) -> None:
        self.bank, self.at = bank, at
        self.cache = bank.reference_cache()
        self.decoded = 0

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        prompt = ids.shape[1] > 1 or not self.cache.get_seq_length()
        if prompt:
            self.decoded = 0
        follow(self.bank.oracle, self.at(self.decoded))
        if prompt and self.at(0).last_token_full:
            return self.in_two(ids)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = self.bank.oracle.step(ids, self.cache, mask, positions)
        self.decoded += not prompt
        return logits

    def in_two(self, ids: torch.Tensor) -> torch.Tensor:
        """A prompt as prefill says, its last token as decode says."""
        oracle, parts = self.bank.oracle, []
        for piece, actions in ((ids[:, :-1], oracle.prefill), (ids[:, -1:], oracle.decode)):
            if piece.shape[1]:
                oracle.behave(actions, actions, oracle.factors)
                parts.append(oracle.step(piece, self.cache))
        return torch.cat(parts, 1)


def check(
    bank: Entry,
    decision: Decision,
    at: Callable[[int], SkipPlan],
    steps: Sequence[int],
    *,
    batch: int = 1,
    keep: int = 1,
    seed: int = 0,
) -> Any:
    """A request beside the oracle, which does what `at` says of each decoded token."""
    cache, reference = bank.runtime.new_cache(plan=decision), Reference(bank, at)
    for number, count in enumerate(steps):
        ids = bank.tokens(batch, count, seed + number)
        with torch.no_grad():
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=keep).logits
        expected = reference.step(ids)[:, -keep:]
        assert_close(logits, expected, bank.tolerance, f"step {number}")
    for layer, held in enumerate(stored(cache)):
        if held is not None:
            assert_close(held[0], reference.cache.layers[layer].keys, bank.tolerance, "keys")
            assert_close(held[1], reference.cache.layers[layer].values, bank.tolerance, "values")
    bank.oracle.behave({})
    return cache


def mean_by_hand(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    table, rows = model.get_input_embeddings().weight.detach().double(), []
    for row in range(ids.shape[0]):
        kept = [int(t) for i, t in enumerate(ids[row]) if mask is None or mask[row, i]]
        rows.append(sum(table[t] for t in kept) / len(kept))
    return sum(rows) / len(rows)
