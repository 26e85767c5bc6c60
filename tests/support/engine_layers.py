"""Decoder layers as engines build them, with norms that add, and as textbooks write them.

`PairLayer` and the others are written like vLLM's layers of the family that a test names. What
they compute is written out in `textbook`, in float64, with nothing of adaskip_fx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

HIDDEN = 8
Replace = Callable[[torch.Tensor], torch.Tensor]


class AddingNorm(nn.Module):
    """RMS norm that adds a residual first, and then returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        x = x if residual is None else x + residual
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return normed if residual is None else (normed, x)


class Body(nn.Module):
    """Stands for attention or an FFN: a matrix, called with positions and with the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / math.sqrt(HIDDEN))

    def forward(self, hidden_states: torch.Tensor, positions: Any = None) -> torch.Tensor:
        return torch.tanh(hidden_states @ self.weight.T)


def modules(layer: nn.Module, **made: type[nn.Module]) -> None:
    for name, kind in made.items():
        setattr(layer, name, kind())


class PairLayer(nn.Module):
    """As vLLM's Llama: the stream is a pair, which the next norm adds."""

    def __init__(self) -> None:
        super().__init__()
        modules(self, input_layernorm=AddingNorm, self_attn=Body)
        modules(self, post_attention_layernorm=AddingNorm, mlp=Body)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class SandwichPairLayer(nn.Module):
    """As vLLM's Gemma 2: a norm behind each body besides."""

    def __init__(self) -> None:
        super().__init__()
        modules(self, input_layernorm=AddingNorm, self_attn=Body)
        modules(self, post_attention_layernorm=AddingNorm, mlp=Body)
        modules(self, pre_feedforward_layernorm=AddingNorm, post_feedforward_layernorm=AddingNorm)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, residual = self.pre_feedforward_layernorm(hidden_states, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden_states)), residual


class PlainLayer(nn.Module):
    """As StableLM, and with a multiplier as Granite; transformers' layers unpack two values."""

    def __init__(self, residual_multiplier: float | None = None, unpacks: bool = False) -> None:
        super().__init__()
        modules(self, input_layernorm=AddingNorm, self_attn=Body)
        modules(self, post_attention_layernorm=AddingNorm, mlp=Body)
        if residual_multiplier is not None:
            self.residual_multiplier = residual_multiplier
        self.unpacks = unpacks

    def forward(self, hidden_states: Any, positions: Any = None) -> Any:
        factor = getattr(self, "residual_multiplier", 1.0)
        branch = self.self_attn(hidden_states=self.input_layernorm(hidden_states))
        if self.unpacks and isinstance(branch, tuple):
            branch = branch[0]
        hidden_states = hidden_states + branch * factor
        branch = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + branch * factor


class PostNormLayer(nn.Module):
    """As OLMo 2: norms behind the bodies alone."""

    def __init__(self) -> None:
        super().__init__()
        modules(self, self_attn=Body, post_attention_layernorm=AddingNorm)
        modules(self, mlp=Body, post_feedforward_layernorm=AddingNorm)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        branch = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states = hidden_states + self.post_attention_layernorm(branch)
        branch = self.post_feedforward_layernorm(self.mlp(hidden_states))
        return hidden_states + branch, hidden_states


class ParallelLayer(nn.Module):
    """As Cohere: both bodies read one norm."""

    def __init__(self) -> None:
        super().__init__()
        modules(self, input_layernorm=AddingNorm, self_attn=Body, mlp=Body)

    def forward(self, positions: Any, hidden_states: Any, residual: Any) -> Any:
        normed = self.input_layernorm(hidden_states)
        both = self.self_attn(positions=positions, hidden_states=normed) + self.mlp(normed)
        return hidden_states + both, hidden_states


def run(layers: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The stream behind layers that hand on a pair, or one tensor."""
    pair = isinstance(layers[0], PairLayer | SandwichPairLayer)
    h, r = x, None
    for layer in layers:
        result = layer(hidden_states=h, positions=None, **_residual(layer, r))
        h, r = (
            (result[0], result[1] if pair else None)
            if isinstance(result, tuple)
            else (result, None)
        )
    return h if r is None else h + r


def _residual(layer: nn.Module, r: Any) -> dict[str, Any]:
    return {} if isinstance(layer, PlainLayer) else {"residual": r}


def textbook(
    layers: list[nn.Module], x: torch.Tensor, instead: Mapping[str, Replace]
) -> torch.Tensor:
    """The stream [tokens, hidden] in float64, with some branches (``"0.ffn"``) replaced."""
    x = x.double()
    for number, layer in enumerate(layers):
        if isinstance(layer, ParallelLayer):
            normed = _normed(x, layer.input_layernorm)
            branches = {"attention": layer.self_attn, "ffn": layer.mlp}
            ran = [b for k, b in branches.items() if f"{number}.{k}" not in instead]
            x = x + sum((_body(normed, b) for b in ran), torch.zeros_like(x))
            continue
        for kind in ("attention", "ffn"):
            name = f"{number}.{kind}"
            x = instead[name](x) if name in instead else x + _branch(layer, kind, x)
    return x


def _branch(layer: Any, kind: str, x: torch.Tensor) -> torch.Tensor:
    body = layer.self_attn if kind == "attention" else layer.mlp
    if isinstance(layer, PostNormLayer):
        behind = {"attention": "post_attention_layernorm", "ffn": "post_feedforward_layernorm"}
        return _normed(_body(x, body), getattr(layer, behind[kind]))
    if isinstance(layer, SandwichPairLayer):
        before = {"attention": "input_layernorm", "ffn": "pre_feedforward_layernorm"}
        behind = {"attention": "post_attention_layernorm", "ffn": "post_feedforward_layernorm"}
        inner = _body(_normed(x, getattr(layer, before[kind])), body)
        return _normed(inner, getattr(layer, behind[kind]))
    before = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
    factor = float(getattr(layer, "residual_multiplier", 1.0))
    return factor * _body(_normed(x, getattr(layer, before[kind])), body)


def _body(x: torch.Tensor, body: Any) -> torch.Tensor:
    return torch.tanh(x @ body.weight.double().T)


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
