"""Rotary embeddings whose frequencies depend on the length, as a function of the positions alone.

Of ``longrope`` (Phi-3.5, Phi-4-mini) and dynamic NTK transformers keeps the frequencies of the last
call in the module and exchanges them in forward, so that a model's answer depends on what it was
called with before, and forward has an effect that no graph repeats. A compiled model has modules
whose forward gives, without any effect, what a model gives that has run nothing longer yet: the
frequencies of the step's own length, its largest position and one. Below the switch these are the
modules' own; above it they are transformers' own as well (longrope), or its formula (dynamic NTK).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_DECORATORS = "transformers.modeling_rope_utils"


def by_length(model: Any) -> list[nn.Module]:
    """Return the rotary embeddings of a model whose frequencies depend on the length."""
    return [m for m in model.modules() if _switches(m) and _is_known(type(m))]


def written(module: nn.Module) -> frozenset[str]:
    """Return the names of what the forward of such a module writes to it."""
    names = ("inv_freq", "long_inv_freq", "max_seq_len_cached")
    return frozenset(f"{prefix}{name}" for prefix in ("", *_switches(module)) for name in names)


def switches_at(model: Any) -> list[int]:
    """Return the lengths beyond which a model has other frequencies."""
    return [_limit(m, prefix) for m in by_length(model) for prefix in _switches(m)]


def make_pure(model: nn.Module) -> None:
    """Give such modules of a compiled model a forward without effects."""
    for module in by_length(model):
        for name, tensor in module._buffers.items():  # each model has its own
            module._buffers[name] = None if tensor is None else tensor.clone()
        for prefix, kind in _switches(module).items():
            if kind == "longrope":
                setattr(module, f"{prefix}adaskip_long", _long(module, prefix, kind))
        made: Any = type(module)
        module.__class__ = _pure(made)


def place(model: nn.Module, device: torch.device) -> None:
    """Put the frequencies of a compiled model where the model is."""
    for module in by_length(model):
        if isinstance(module, PureRotary):
            held = {n: v for n, v in vars(module).items() if isinstance(v, torch.Tensor)}
            vars(module).update({n: v.to(device) for n, v in held.items()})
            placed = {n: v.to(device) for n, v in module._buffers.items() if v is not None}
            module._buffers.update(placed)


@contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Meanwhile such modules run transformers' own forward; afterwards they are as they were.

    Other threads that run the model never find an attribute missing.
    """
    modules = by_length(model)
    kinds = [*map(type, modules)]
    before = [
        (vars(m).copy(), {n: (b, None if b is None else b.clone()) for n, b in m._buffers.items()})
        for m in modules
    ]
    try:
        for module, kind in zip(modules, kinds, strict=True):
            module.__class__ = kind.__bases__[1] if issubclass(kind, PureRotary) else kind
        yield
    finally:
        for module, kind, (attributes, buffers) in zip(modules, kinds, before, strict=True):
            module.__class__ = kind
            _restore(vars(module), attributes)
            _restore(module._buffers, {name: buffer for name, (buffer, _) in buffers.items()})
            for buffer, values in buffers.values():
                if buffer is not None and values is not None and not torch.equal(buffer, values):
                    buffer.copy_(values)


def _restore(held: dict[str, Any], before: dict[str, Any]) -> None:
    held.update(before)
    for name in [name for name in held if name not in before]:
        del held[name]


def _switches(module: nn.Module) -> dict[str, str]:
    """Return the types of rope that depend on the length, by what their attributes begin with."""
    types = getattr(module, "rope_type", None)
    by_layer = types if isinstance(types, dict) else {"": types}
    known = {f"{k}_" if k else k: t for k, t in by_layer.items() if isinstance(t, str)}
    return {p: t for p, t in known.items() if t == "longrope" or "dynamic" in t}


def _is_known(kind: type) -> bool:
    return issubclass(kind, PureRotary) or _undecorated(kind) is not None


def _undecorated(kind: type) -> Callable[..., Any] | None:
    """Return a class's forward without transformers' update of frequencies; None if it has none."""
    forward: Any = getattr(kind, "forward", None)
    while forward is not None:
        inner = getattr(forward, "__wrapped__", None)
        if getattr(forward, "__globals__", {}).get("__name__") == _DECORATORS:
            return inner
        forward = inner
    return None


def _parameters(module: Any, prefix: str) -> Any:
    rope = module.config.rope_parameters
    return rope[prefix.removesuffix("_")] if prefix else rope


def _limit(module: Any, prefix: str) -> int:
    if _switches(module)[prefix] == "longrope":
        return int(_parameters(module, prefix)["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


def _long(module: Any, prefix: str, kind: str) -> torch.Tensor:
    """Return the frequencies of long texts, as transformers makes them."""
    original = getattr(module, f"{prefix}original_inv_freq")
    config, layer = copy.deepcopy(module.config), prefix.removesuffix("_") or None
    named = {} if layer is None else {"layer_type": layer}
    beyond = _limit(module, prefix) + 1
    frequencies: torch.Tensor
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, original.device, seq_len=beyond, **named)
    return frequencies


class PureRotary:
    """The forward of such a module, in a compiled model."""

    def forward(
        self: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> Any:
        """Return the cosines and sines of positions, by the frequencies of their length."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        kind = self.rope_type if layer_type is None else self.rope_type[layer_type]
        more = {} if layer_type is None else {"layer_type": layer_type}
        seen = self
        if kind == "longrope" or "dynamic" in kind:
            short = getattr(self, f"{prefix}original_inv_freq")
            length = position_ids.max() + 1
            if kind == "longrope":
                long = getattr(self, f"{prefix}adaskip_long")
                limit = _parameters(self, prefix)["original_max_position_embeddings"]
            else:
                long, limit = _dynamic(self, prefix, length), self.original_max_seq_len
            seen = _Seen(self, f"{prefix}inv_freq", _chosen(length > limit, long, short))
        return self.adaskip_undecorated(seen, x, position_ids, **more)


class _Seen:
    """A module as its forward sees it, with frequencies of one step."""

    def __init__(self, module: Any, name: str, frequencies: torch.Tensor) -> None:
        self._module = module
        setattr(self, name, frequencies)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _chosen(is_long: torch.Tensor, long: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
    return torch.where(is_long, long, short)


def _dynamic(module: Any, prefix: str, length: torch.Tensor) -> torch.Tensor:
    """Return the frequencies of dynamic NTK for a length, by transformers' formula."""
    rope, config = _parameters(module, prefix), module.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(width * rope.get("partial_rotary_factor", 1.0))
    factor, trained = rope["factor"], config.max_position_embeddings
    grown = (factor * length.clamp_min(trained) / trained - (factor - 1)) ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=length.device) / dim
    frequencies: torch.Tensor = 1.0 / ((rope["rope_theta"] * grown) ** exponents)
    return frequencies


#: Classes without effects by the identity of those that they are made of, which they keep alive.
_made: WeakValueDictionary[int, type] = WeakValueDictionary()


def _pure(kind: type) -> type:
    made = _made.get(id(kind))
    if made is None:
        forward = _undecorated(kind)
        assert forward is not None
        members = {"adaskip_undecorated": staticmethod(forward)}
        made = _made[id(kind)] = type(kind.__name__, (PureRotary, kind), members)
    return made
