"""An eager model whose attention sees windows, and adds what stands in for what they hide.

Hooks on transformers' attention modules do it, and an attention function of its own: whole texts,
all rows of one length or padded at the end. Nothing of the product is used but the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.utils.transformers_internals import on_attention

from .setup import Subject
from .stand_ins import RIDGE, Kind, StandIn, fitted

_NAME = "adaskip_study_stand_ins"
_UNKNOWN = ("softcap", "s_aux", "sliding_window")  # what changes scores, or what is seen


class WindowedModel:
    """A model with the windows that a plan has in prompts.

    Attributes:
        stand_ins: By sublayer; none at first.
        explained: By sublayer, the share of what the window hid that its stand-in gave back where
            it was fitted, of the sum of squares.
    """

    def __init__(self, subject: Subject, plan: SkipPlan) -> None:
        """Take a subject's eager model; it is changed only within `running`."""
        self.stand_ins: dict[Sublayer, StandIn] = {}
        self.explained: dict[Sublayer, float] = {}
        self._model = subject.model
        self._windows = dict(plan.windows.prefill)
        paths = subject.runtime.graphs.structure.modules
        self._sublayers: dict[nn.Module, Sublayer] = {
            self._model.get_submodule(paths[str(s)][0].rpartition(".")[0]): s for s in self._windows
        }
        self._full = False
        self._fit: tuple[Kind, float] | None = None

    @contextmanager
    def running(self) -> Iterator[WindowedModel]:
        """Meanwhile the model sees windows."""
        AttentionInterface.register(_NAME, self._attend)
        hooks = [
            module.register_forward_hook(self._hook, with_kwargs=True) for module in self._sublayers
        ]
        try:
            with on_attention(self._model, _NAME):
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, ids: torch.Tensor, keep: int = 0, *, full: bool = False) -> torch.Tensor:
        """Return the logits [B, keep, V] of the last tokens of ids int64 [B, T]; 0 keeps all.

        Args:
            ids: Rows that are padded at the end, if at all.
            keep: Tokens.
            full: Whether everything is seen, and nothing stands in.
        """
        self._full = full
        try:
            output = self._model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        finally:
            self._full = False
        logits: torch.Tensor = output.logits
        return logits

    @torch.no_grad()
    def fit(self, ids: torch.Tensor, kind: Kind, ridge: float = RIDGE) -> None:
        """Fit a stand-in of each sublayer with a window, in order.

        All rows go through the model at once, so that each is fitted on the stream as those before
        it have made it.

        Args:
            ids: Int64 [B, T], without padding, and longer than the windows.
            kind: Of the stand-ins; whether they are to be refined does not matter.
            ridge: See `fitted`.
        """
        self.stand_ins, self.explained, self._fit = {}, {}, (kind, ridge)
        try:
            self.logits(ids, 1)
        finally:
            self._fit = None

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        sublayer = self._sublayers[module]
        if self._full:
            return output
        seen = args[0] if args else kwargs["hidden_states"]
        read = {"input": seen, "output": output[0]}
        first = hidden_from(self._windows[sublayer])
        if self._fit is not None:
            self._full = True
            lost = module.forward(*args, **kwargs)[0] - output[0]
            self._full = False
            self._fit_one(sublayer, read[self._fit[0].reads][:, first:], lost[:, first:])
        stand_in = self.stand_ins.get(sublayer)
        if stand_in is None:
            return output
        added = stand_in(read[stand_in.reads][:, first:]).to(output[0].dtype)
        return output[0] + pad(added, (0, 0, output[0].shape[1] - added.shape[1], 0)), *output[1:]

    def _fit_one(self, sublayer: Sublayer, read: torch.Tensor, lost: torch.Tensor) -> None:
        assert self._fit is not None
        stand_in = fitted(zip(read, lost, strict=True), *self._fit)
        left = total = 0.0
        for x, t in zip(read, lost.float(), strict=True):
            left += float((t - stand_in(x)).square().sum())
            total += float(t.square().sum())
        self.stand_ins[sublayer] = stand_in
        self.explained[sublayer] = 1 - left / total if total else 0.0

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
        sublayer = None if self._full else self._sublayers.get(module)
        window = None if sublayer is None else self._windows[sublayer]
        output = attend(query, key, value, window, scaling)
        return output.transpose(1, 2).contiguous(), None


def hidden_from(window: Window) -> int:
    """Return the position of the first token that a window hides something from."""
    return window.tokens + window.sinks


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return causal attention [B, H, T, D] through a window, with gradients.

    Args:
        query: [B, H, T, D].
        key, value: [B, H_kv, T, D].
        window: None for everything.
        scale: Of scores; the root of 1 / D if None.
    """
    tokens, kv_heads = key.shape[2], key.shape[1]
    group = query.shape[1] // kv_heads
    full = range(kv_heads) if window is None else window.full_heads
    if window is None or window.seen(tokens) == tokens:
        full = range(kv_heads)
    narrow = [head for head in range(kv_heads) if head not in full]
    parts = []
    for heads in filter(None, ([*full], narrow)):
        mine = torch.tensor(heads, device=query.device)
        q = query.unflatten(1, (kv_heads, group))[:, mine].flatten(1, 2)
        k, v = (t[:, mine].repeat_interleave(group, 1) for t in (key, value))
        if heads is narrow:
            assert window is not None
            parts.append(_in_blocks(q, k, v, window, scale))
        else:
            parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
    order = torch.tensor([*full, *narrow], device=query.device).argsort()
    return torch.cat(parts, 1).unflatten(1, (kv_heads, group))[:, order].flatten(1, 2)


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    scale: float | None,
) -> torch.Tensor:
    """Attend in blocks as long as the window: each sees itself, the one before it, and sinks."""
    (heads, tokens), size, sinks = query.shape[1:3], window.tokens, window.sinks
    after = -tokens % size
    q = pad(query, (0, 0, 0, after)).unflatten(2, (-1, size))
    blocks = q.shape[2]
    k, v = (
        torch.cat(
            (x[:, :, None, :sinks].expand(-1, -1, blocks, -1, -1), *_pairs(x, size, after)), 3
        )
        for x in (key, value)
    )
    at = torch.arange(blocks * size, device=query.device).view(blocks, size, 1)
    back = torch.arange(-size, size, device=query.device) + at[:, :1]
    firsts = torch.arange(sinks, device=query.device).expand(blocks, 1, -1)
    near = (back >= 0) & (back <= at) & (back > at - size)
    mask = torch.cat((firsts <= at - size, near), 2).repeat(heads, 1, 1)
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return output.unflatten(1, (heads, blocks)).flatten(2, 3)[:, :, :tokens]


def _pairs(x: torch.Tensor, size: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks before each block, and the blocks, [B, H, n, size, D] each."""
    padded = pad(x, (0, 0, size, after)).unflatten(2, (-1, size))
    return padded[:, :, :-1], padded[:, :, 1:]
