"""The reference: eager transformers whose branches are replaced by hooks, with windows as masks.

Nothing here uses adaskip_fx. Surrogates are functions of the stream, written out in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Replace = Callable[[torch.Tensor], torch.Tensor]
_LLAMA = {"attention": ("input_layernorm", "self_attn"), "ffn": ("post_attention_layernorm", "mlp")}
_SANDWICH = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "ffn": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_POST_NORM = {
    "attention": ("self_attn", "post_attention_layernorm"),
    "ffn": ("mlp", "post_feedforward_layernorm"),
}
_PARALLEL = {"attention": ("self_attn", "self_attn"), "ffn": ("mlp", "mlp")}
#: model type -> kind -> the first and the last module of its branch; others are as in Llama
BRANCHES: dict[str, dict[str, tuple[str, str]]] = {
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _POST_NORM,
    "cohere": _PARALLEL,
}


def scale(factor: float) -> Replace:
    """``factor * x``."""
    return lambda x: factor * x


def affine(weight: Any, bias: Any, *, normed: bool = False, eps: float = 1e-6) -> Replace:
    """``x + f(x) weight^T + bias``, with f(x) either x or x over its root mean square."""
    weight, bias = (torch.as_tensor(t, dtype=torch.float64) for t in (weight, bias))

    def replaced(x: torch.Tensor) -> torch.Tensor:
        source = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() if normed else x
        return x + source @ weight.T + bias

    return replaced


@contextlib.contextmanager
def replaced(
    model: Any, branches: Mapping[str, Replace], windows: Mapping[int, int]
) -> Iterator[None]:
    """Run a model with branches (``"3.ffn"``) replaced, and layers that see so many last tokens."""
    handles = []
    names = BRANCHES.get(model.config.model_type, _LLAMA)
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    for name, function in branches.items():
        number, kind = name.split(".")
        layer = model.model.layers[int(number)]
        first, last = (getattr(layer, n) for n in names[kind])
        stream: list[torch.Tensor] = []

        def seen(_: Any, args: Any, kwargs: Any, stream: Any = stream) -> None:
            stream[:] = [args[0] if args else kwargs["hidden_states"]]

        def instead(_: Any, __: Any, out: Any, f: Any = function, stream: Any = stream) -> Any:
            x = stream[0].double()
            branch = ((f(x) - x) / multiplier).to(stream[0].dtype)
            return (branch, *out[1:]) if isinstance(out, tuple) else branch

        handles.append(first.register_forward_pre_hook(seen, with_kwargs=True))
        handles.append(last.register_forward_hook(instead))
    for number, tokens in windows.items():

        def masked(_: Any, args: Any, kwargs: Any, tokens: int = tokens) -> Any:
            length = kwargs["hidden_states"].shape[1]
            at = torch.arange(length)
            hidden = (at[:, None] - at[None, :]) >= tokens
            mask = torch.zeros(length, length).masked_fill(hidden, -1e30)
            causal = torch.zeros(length, length).masked_fill(at[:, None] < at[None, :], -1e30)
            return args, {**kwargs, "attention_mask": (mask + causal)[None, None]}

        attention = model.model.layers[number].self_attn
        handles.append(attention.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def log_probabilities(
    model: Any,
    tokens: list[int],
    branches: Mapping[str, Replace] | None = None,
    windows: Mapping[int, int] | None = None,
) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of what follows each token."""
    with replaced(model, branches or {}, windows or {}):
        logits = model(torch.tensor([tokens]), use_cache=False).logits
    return torch.log_softmax(logits[0].float(), -1)
