"""What a plan costs on text: perplexity, KL to the full model, how often they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adaskip_fx.kv_cache.drafting import Drafting
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.runtime import Runtime

_TOKENS = 512  # at a time: distributions over a vocabulary are large


@dataclass
class Cost:
    """Sums over the tokens that were predicted.

    nll: -log p of the right token, in nats; kl: KL(full || skipped), in nats; agreed: tokens where
    both find the same one likeliest.
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(
            min(self.nll / self.tokens, 700.0)
        )  # of a broken model: a float all the same

    def against(self, full: Cost) -> dict[str, float]:
        """Perplexity and its ratio to the full model's, KL a token in nats, top-1 agreement."""
        return {
            "perplexity": self.perplexity,
            "perplexity_ratio": math.exp(min((self.nll - full.nll) / self.tokens, 700.0)),
            "kl": self.kl / self.tokens,
            "agreement": self.agreed / self.tokens,
        }


def costs(
    runtime: Runtime, plans: Sequence[SkipPlan], windows: Sequence[torch.Tensor]
) -> tuple[Cost, list[Cost]]:
    """The full model's cost, and that of each plan's prefill, over windows int64 [1, T]."""
    empty = SkipPlan.empty(runtime.sublayers)
    full, found = Cost(), [Cost() for _ in plans]
    for ids in windows:
        expected = log_probabilities(runtime, empty, ids)
        add(full, expected, expected, ids)
        for plan, cost in zip(plans, found, strict=True):
            add(cost, log_probabilities(runtime, plan, ids), expected, ids)
    return full, found


def decode_costs(
    runtime: Runtime, plans: Sequence[SkipPlan], windows: Sequence[torch.Tensor], tokens: int
) -> tuple[Cost, list[Cost]]:
    """Likewise for decoding: the last `tokens` of each window are fed one by one.

    The prompt before them runs with the plan too, as in a request.
    """
    empty = SkipPlan.empty(runtime.sublayers)
    expected = [decoded(runtime, empty, ids, tokens) for ids in windows]
    full, found = Cost(), [Cost() for _ in plans]
    # A plan's requests one after another: on a GPU they share buffers and recorded graphs.
    for plan, cost in zip((None, *plans), (full, *found), strict=True):
        for ids, right in zip(windows, expected, strict=True):
            actual = right if plan is None else decoded(runtime, plan, ids, tokens)
            add(cost, actual, right, ids[:, -tokens - 1 :])
    return full, found


def decoded(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Log probabilities float32 [tokens, V] of the last `tokens` of a window int64 [1, T]."""
    cache = runtime.new_cache(capacity=ids.shape[1], plan=plan)
    logits = [runtime.step(ids[:, : -tokens - 1], None, None, cache, 1)]
    for i in range(-tokens - 1, -1):
        logits.append(runtime.step(ids[:, i, None], None, None, cache, 1).clone())
    return torch.cat(logits[1:], 1)[0].float().log_softmax(-1)


def continued(
    runtime: Runtime, plan: SkipPlan, prompt: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Logits [n + 1, V] that predict each of `tokens` int64 [1, n] after a prompt, and one more.

    The first comes from the prompt, whose tokens int64 [1, T] run as the plan says of prompts; the
    others are read at once, as the plan says of decoded ones.
    """
    length = prompt.shape[1]
    cache = runtime.new_cache(length + tokens.shape[1], plan=plan, learn=False)
    logits = runtime.step(prompt, None, None, cache, 1).clone()  # (the next step may write there)
    if not tokens.shape[1]:
        return logits[0]
    with cache.verifying(Drafting(length)):
        return torch.cat((logits, runtime.step(tokens, None, None, cache, 0)), 1)[0]


def log_probabilities(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token, at every token but the last: float32 [T - 1, V]."""
    cache = runtime.new_cache(capacity=ids.shape[1], plan=plan)
    return normalised(runtime.step(ids, None, None, cache, 0))


def normalised(logits: torch.Tensor) -> torch.Tensor:
    """Log probabilities float32 [T - 1, V] of logits [1, T, V]."""
    return logits[0, :-1].float().log_softmax(-1)


def add(cost: Cost, actual: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> None:
    """Count one window: log probabilities [T - 1, V] of a plan and of the full model."""
    right = ids[0, 1:, None]
    cost.tokens += len(right)
    cost.nll -= float(actual.gather(-1, right).double().sum())
    cost.agreed += int((actual.argmax(-1) == expected.argmax(-1)).sum())
    parts = (torch.split(both, _TOKENS) for both in (actual, expected))
    for a, e in zip(*parts, strict=True):
        cost.kl += float((e.exp() * (e - a)).sum(-1).double().sum())
