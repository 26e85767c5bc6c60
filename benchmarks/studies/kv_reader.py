"""An eager model that reads keys and values as a storage has left them, through windows.

A prompt attends to its own keys and values as they are. What follows it reads them, and its own,
as they are stored. Eviction is SnapKV's (arXiv 2404.14469): at the end of a prompt each K/V head
keeps the last tokens, and of those before them the ones that the last tokens attend to most. Heads
with a window see so few tokens that none is evicted. Nothing of the product is used but the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window
from adaskip_fx.testing import Oracle
from adaskip_fx.utils.transformers_internals import on_attention

from .kv_storage import Storage
from .setup import Subject

OBSERVED = 32  # last tokens that score the others, as in the authors' code
_NAME = "adaskip_study_kv"
_UNKNOWN = ("softcap", "s_aux", "sliding_window")  # what changes scores, or what is seen


@dataclass
class Reader:
    """An eager model under a plan, after a prompt.

    Attributes:
        subject: Whose model it is.
        plan: Its windows, and the attention that it skips, hold in both phases.
        prompt: Tokens of the prompt.
        storage: How keys and values are stored; None while the prompt is read, and where they are
            read as they were written.
        scores: By layer what the prompt's last tokens attend to, [H_kv, tokens before them].
    """

    subject: Subject
    plan: SkipPlan
    prompt: int = 0
    storage: Storage | None = None
    scores: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        windows = self.plan.windows.decode
        self.windows: Mapping[int, Window] = {s.layer: w for s, w in windows.items()}
        self._cache = DynamicCache()
        self._last = torch.empty(0)

    @contextmanager
    def after(self, prompt: torch.Tensor) -> Iterator[Reader]:
        """Read a prompt int64 [1, T], and forget it in the end."""
        model, graphs = self.subject.model, self.subject.runtime.graphs
        instead = {str(s): self.plan.surrogates.get(s) for s in self.plan.decode}
        oracle = Oracle(model, graphs.structure.modules, prefill=instead, decode=instead)
        AttentionInterface.register(_NAME, self._attend)
        self._cache, self.prompt = DynamicCache(), prompt.shape[1]
        with on_attention(model, _NAME), oracle.watching() if instead else nullcontext():
            self._last = self._step(prompt, 1)
            yield self
        self._cache, self.scores = DynamicCache(), {}

    def logits(self, tokens: torch.Tensor, storage: Storage | None) -> torch.Tensor:
        """Return what predicts each of `tokens` int64 [1, n] after the prompt, and one more.

        That is [n + 1, V], each token read at once with those before it, as decoded ones are. The
        first comes from the prompt alone. The prompt may be gone on with again.
        """
        if not tokens.shape[1]:
            return self._last
        self.storage = storage
        try:
            return torch.cat((self._last, self._step(tokens, 0)))
        finally:
            self._cache.crop(-tokens.shape[1])
            self.storage = None

    @torch.no_grad()
    def _step(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        given = {"past_key_values": self._cache, "use_cache": True, "logits_to_keep": keep}
        logits: torch.Tensor = self.subject.model(input_ids=ids, **given).logits[0]
        return logits

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: None = None,
        *,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend as transformers' attention functions do: [B, H, T, D] in, [B, T, H, D] out."""
        unknown = [name for name in _UNKNOWN if more.get(name) is not None]
        if unknown:
            raise ValueError(f"attention with {unknown[0]} is not simulated; take another model")
        layer, group = module.layer_idx, query.shape[1] // key.shape[1]
        if query.shape[2] == key.shape[2]:
            self.scores[layer] = observed(query, key, scaling)
        if self.storage is not None:
            key, value = self.storage.read(key, value)
        seen = self._seen(layer, query.shape[2], key)
        mask = None if seen is None else seen.repeat_interleave(group, 0).unsqueeze(0)
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        causal = {"attn_mask": mask, "is_causal": mask is None}
        output = scaled_dot_product_attention(query, key, value, scale=scaling, **causal)
        return output.transpose(1, 2).contiguous(), None

    def _seen(self, layer: int, new: int, key: torch.Tensor) -> torch.Tensor | None:
        """Return what the last `new` of all tokens see, bool [H_kv, new, S]; None for all."""
        window, (heads, stored) = self.windows.get(layer), key.shape[1:3]
        if window is None and new == stored:
            return None
        tokens = torch.arange(stored, device=key.device)
        back = tokens[stored - new :, None] - tokens
        seen = (back >= 0).expand(heads, new, stored)
        full = torch.ones(heads, dtype=torch.bool, device=key.device)
        if window is not None:
            full[[head for head in range(heads) if head not in window.full_heads]] = False
            narrow = (back < window.tokens) | (tokens < window.sinks)
            seen = seen & (full[:, None, None] | narrow)
        if self.storage is not None and self.storage.share < 1:
            scores, count = self.scores[layer], self.storage.kept(self.prompt)
            held = kept(scores, self.prompt, count, self.storage.pooled)
            held = torch.cat((held, held.new_ones(heads, stored - self.prompt)), 1)
            seen = seen & (held | ~full[:, None])[:, None]
        return seen


def observed(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Return how much the last tokens attend to each one before them, float32 [H_kv, T - last].

    Summed over them and over the query heads of a K/V head.

    Args:
        query, key: Of a prompt, [1, H, T, D] and [1, H_kv, T, D].
        scaling: Of scores; the root of 1 / D if None.
    """
    heads, tokens, dim = key.shape[1:]
    last = _last(tokens)
    asking = query[0, :, -last:].float().unflatten(0, (heads, -1))
    scores = asking @ key[0, :, None].float().mT * (dim**-0.5 if scaling is None else scaling)
    ahead = torch.ones(last, tokens, dtype=torch.bool, device=key.device).triu(tokens - last + 1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)[..., : tokens - last].sum((1, 2))


def kept(scores: torch.Tensor, prompt: int, count: int, pooled: int) -> torch.Tensor:
    """Return which tokens of a prompt each head keeps, bool [H_kv, prompt], `count` of each."""
    last = prompt - scores.shape[1]
    averages = avg_pool1d(scores, pooled, stride=1, padding=pooled // 2)
    best = averages.topk(max(count - last, 0), -1).indices
    found = torch.zeros(scores.shape[0], prompt, dtype=torch.bool, device=scores.device)
    found[:, prompt - min(last, count) :] = True
    return found.scatter(1, best, True)


def _last(prompt: int) -> int:
    """Return how many tokens score the others; fewer in a short prompt."""
    return max(1, min(OBSERVED, prompt // 8))
