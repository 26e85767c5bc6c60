"""The reference: plain eager transformers with some sublayers replaced, and sums in float64.

Nothing here uses adaskip_fx or adaskip_passes. A Llama layer is written out as the two lines that
it is, and a skipped sublayer is ``x`` or ``factor * x``. A skipped attention still puts zeros into
the DynamicCache, which nobody reads: transformers takes the length of the sequence from layer 0.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

RUN, SKIP, KV_ONLY = "run", "skip", "kv_only"


class Oracle:
    """A deep copy of a Llama model whose layers do what `prefill` and `decode` say.

    Attributes:
        model: the copy; its own ``generate`` and ``forward`` are the reference.
        prefill, decode: sublayer name (``"3.ffn"``) to RUN, SKIP or KV_ONLY; missing ones run.
            One token on a filled cache is decode, everything else prefill.
        factors: sublayer name to the scale that stands in for it when it is skipped.
        streams: the residual stream [batch, tokens, hidden] before and after each sublayer that
            ran in the last forward.
    """

    def __init__(self, model: Any, attention: str = "sdpa") -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.set_attn_implementation(attention)
        self.prefill: Mapping[str, str] = {}
        self.decode: Mapping[str, str] = {}
        self.factors: Mapping[str, float] = {}
        self.streams: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._actions: Mapping[str, str] = {}
        self._cache = cache_name(model.forward)
        self.model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for index, layer in enumerate(self.model.model.layers):
            layer.forward = functools.partial(self._layer, index, layer)

    def behave(
        self,
        prefill: Mapping[str, str],
        decode: Mapping[str, str] | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> Oracle:
        """Set what is skipped; `decode` is as `prefill` when None."""
        self.prefill, self.decode = prefill, prefill if decode is None else decode
        self.factors = factors or {}
        return self

    @torch.no_grad()
    def step(
        self,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of new tokens; the cache takes them in."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self._cache: cache},
        )
        logits: torch.Tensor = output.logits
        return logits

    def _begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        past = kwargs.get(self._cache)
        filled = past is not None and past.get_seq_length() > 0
        ids = kwargs.get("input_ids", args[0] if args else None)
        new = ids if ids is not None else kwargs["inputs_embeds"]
        decoding = filled and new.shape[1] == 1
        self._actions = self.decode if decoding else self.prefill
        self.streams = {}

    def _layer(self, index: int, layer: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        def attention(x: torch.Tensor) -> torch.Tensor:
            branch: torch.Tensor = layer.self_attn(
                hidden_states=layer.input_layernorm(x), **kwargs
            )[0]
            return branch

        def ffn(x: torch.Tensor) -> torch.Tensor:
            branch: torch.Tensor = layer.mlp(layer.post_attention_layernorm(x))
            return branch

        for kind, branch in (("attention", attention), ("ffn", ffn)):
            name = f"{index}.{kind}"
            action = self._actions.get(name, RUN)
            if action == RUN:
                after = x + branch(x)
                self.streams[name] = (x, after)
                x = after
            elif action == KV_ONLY:
                branch(x)  # for its K/V
                if name in self.factors:
                    x = (x.float() * self.factors[name]).to(x.dtype)
            else:
                if kind == "attention" and kwargs.get(self._cache) is not None:
                    _hold_place(layer.self_attn, x, kwargs[self._cache])
                if name in self.factors:
                    x = (x.float() * self.factors[name]).to(x.dtype)
        return x


def cache_name(forward: Any) -> str:
    """What a forward calls its cache; transformers 5.24 has a name of its own for it."""
    named = inspect.signature(forward).parameters
    return next(n for n in ("cache", "cache_params", "past_key_values") if n in named)


def _hold_place(attention: Any, x: torch.Tensor, cache: DynamicCache) -> None:
    heads = attention.config.num_key_value_heads
    nothing = x.new_zeros(x.shape[0], heads, x.shape[1], attention.head_dim)
    cache.update(nothing, nothing, attention.layer_idx)


@torch.no_grad()
def plain_streams(
    model: Any, input_ids: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The stream before and after each sublayer of an untouched Llama model, seen by hooks."""
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}

    def enters(name: str, previous: str | None) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            before[name] = args[0].clone()
            if previous is not None:
                after[previous] = before[name]

        return hook

    def leaves(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            after[name] = output.clone()

        return hook

    handles = []
    for i, layer in enumerate(model.model.layers):
        attention, ffn = f"{i}.attention", f"{i}.ffn"
        handles += [
            layer.input_layernorm.register_forward_pre_hook(enters(attention, None)),
            layer.post_attention_layernorm.register_forward_pre_hook(enters(ffn, attention)),
            layer.register_forward_hook(leaves(ffn)),
        ]
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (before[name], after[name]) for name in before}


def moments(
    before: torch.Tensor, after: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Per row, summed over valid tokens, float64 [batch, 5].

    cos(a, b); |b| / |a|; |a|^2; |b|^2; 1 for the streams a (before) and b (after).
    """
    a, b = before.double(), after.double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    a_norm, b_norm = a.norm(dim=-1), b.norm(dim=-1)
    rows = (cosine, b_norm / a_norm, a_norm**2, b_norm**2, torch.ones_like(cosine))
    per_token = torch.stack(rows, -1)
    if valid is not None:
        per_token = per_token * valid.unsqueeze(-1)
    return per_token.sum(1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest expected value; infinite for NaN."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    wide = expected.double()
    error = (actual.double() - wide).abs().max() / wide.abs().max().clamp_min(1e-30)
    return float("inf") if bool(error.isnan()) else float(error)


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "values"
) -> None:
    """AssertionError that names `what` when the relative error is above `tolerance`."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
