"""The reference of windows: a Llama that reads a whole text at once, with masks written out.

Nothing of adaskip_fx is used; what a token sees is looked up for each pair of tokens and each head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

#: Of a layer: sinks, tokens, and the K/V heads that see everything.
Seen = tuple[int, int, tuple[int, ...]]


class WindowedEager:
    """A deep copy of a Llama or Mistral whose layers see what `windows` say."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.set_attn_implementation("sdpa")
        self.own = getattr(model.config, "sliding_window", None)

    @torch.no_grad()
    def logits(
        self,
        ids: torch.Tensor,
        firsts: Sequence[int],
        windows: Sequence[Mapping[int, Seen]],
    ) -> torch.Tensor:
        """Logits [B, S, V] of whole rows.

        ids: [B, S]; row b begins with firsts[b] tokens of padding. windows: for each column, those
        of its token's phase, by layer.
        """
        stored = ids.shape[1]
        positions = torch.stack([(torch.arange(stored) - first).clamp_min(0) for first in firsts])
        with self._masked(firsts, windows):
            output = self.model(input_ids=ids, position_ids=positions, use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _masked(
        self, firsts: Sequence[int], windows: Sequence[Mapping[int, Seen]]
    ) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.model.model.layers):
            mask = self._mask(firsts, [at.get(index) for at in windows])

            def exchange(_: Any, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
                return args, {**kwargs, "attention_mask": mask}

            handles.append(layer.self_attn.register_forward_pre_hook(exchange, with_kwargs=True))
        yield
        for handle in handles:
            handle.remove()

    def _mask(self, firsts: Sequence[int], seen: Sequence[Seen | None]) -> torch.Tensor:
        config, stored = self.model.config, len(seen)
        kv_heads, group = config.num_key_value_heads, config.num_attention_heads
        mask = torch.zeros(len(firsts), group, stored, stored, dtype=torch.bool)
        for head in range(group):
            kv_head = head // (group // kv_heads)
            for t, window in enumerate(seen):
                for row, first in enumerate(firsts):
                    for j in range(t + 1):
                        near = window is None or kv_head in window[2]
                        if window is not None and not near:
                            near = t - j < window[1] or j - first < window[0]
                        within = self.own is None or t - j < self.own
                        mask[row, head, t, j] = (near and within and j >= first) or j == t
        return mask
