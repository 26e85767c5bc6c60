"""The reference of windows: an eager model's attention with an explicit mask in some layers.

Nothing of the passes is used here: PyTorch's own attention, or transformers' where scores have soft
caps or sinks, is called with one boolean for every query, key and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from adaskip_fx.utils.transformers_internals import attends_by_itself, on_attention

#: Sinks and tokens of each K/V head of one attention sublayer.
Heads = Sequence[tuple[int, int]]


class SeenThrough(TorchFunctionMode):
    """Meanwhile attention of the layer that runs sees what its window shows.

    Attributes:
        heads: Of that layer; None where everything is seen.
        narrowed: How many calls got a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads: Heads | None = None
        self.narrowed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or self.heads is None:
            return func(*args, **kwargs)
        self.narrowed += 1
        query, key, *more = args
        seen = kwargs.pop("attn_mask", None)
        causal = kwargs.pop("is_causal", False)
        mask = explicit_mask(query, key, seen, bool(causal), self.heads)
        return func(query, key, *more, **{**kwargs, "attn_mask": mask})


def explicit_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    heads: Heads,
) -> torch.Tensor:
    """Return what each query sees through the windows, bool [B, H, T, S].

    Args:
        query: [B, H, T, D].
        key: [B, H_kv or H, S, D].
        seen: The model's own mask, [B or 1, 1 or H, T, S]: bool, or added to scores.
        causal: Whether the model has none because it is causal.
        heads: Of each K/V head its sinks and tokens.
    """
    (batch, query_heads, tokens, _), stored = query.shape, key.shape[2]
    if seen is None:
        full = torch.ones(tokens, stored, dtype=torch.bool, device=query.device)
        own_mask = (full.tril() if causal else full).expand(batch, query_heads, tokens, stored)
    else:
        lets = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        own_mask = lets.expand(batch, query_heads, tokens, stored)
    group, mask = query_heads // len(heads), torch.zeros_like(own_mask)
    for row in range(batch):
        real = own_mask[row, 0].any(0).nonzero().flatten()
        first = int(real[0]) if real.numel() else 0
        for t in range(tokens):
            visible = own_mask[row, 0, t].nonzero().flatten()
            if not visible.numel():
                mask[row, :, t] = own_mask[row, :, t]
                continue
            position = int(visible[-1])
            for head, (sinks, last) in enumerate(heads):
                mine = slice(head * group, (head + 1) * group)
                mask[row, mine, t, first : first + sinks] = True
                mask[row, mine, t, max(position - last + 1, 0) : position + 1] = True
    return mask & own_mask


def layer_path(paths: str | Sequence[str]) -> str:
    """Return the module of a decoder layer that one of its sublayers' modules is in."""
    path = paths if isinstance(paths, str) else paths[0]
    parts = path.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def _added(model: Any, mask: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Return what is added to the scores of all heads, [B, H, T, S], of the model's own mask."""
    batch, _, tokens, stored = mask.shape
    count = model.config.get_text_config().num_attention_heads
    query, key = mask.new_empty(batch, count, tokens, 0), mask.new_empty(batch, 1, stored, 0)
    seen = explicit_mask(query, key, mask, causal=False, heads=heads)
    hidden = torch.finfo(mask.dtype).min
    return torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, hidden)


@contextmanager
def looking(
    model: nn.Module, layers: Mapping[str, str], heads_of: Callable[[str], Heads | None]
) -> Iterator[None]:
    """Meanwhile the model's attention sees what `heads_of` says of each sublayer now.

    Args:
        model: Eager; meanwhile its attention is PyTorch's, or where that is another one the eager
            one of transformers, if the registry gives it that.
        layers: The module of the layer that each attention sublayer is in.
        heads_of: Sinks and tokens by K/V head; None: everything.

    Raises:
        RuntimeError: Attention of a layer that has a window was not seen.
    """
    mode, handles = SeenThrough(), list[Any]()
    of_transformers = isinstance(model, PreTrainedModel)
    written_out = of_transformers and attends_by_itself(model)

    def before(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            mode.heads, mode.narrowed = heads_of(name), 0
            added = kwargs.get("attention_mask")
            if written_out and mode.heads is not None and added is not None:
                mode.narrowed += 1
                kwargs = {**kwargs, "attention_mask": _added(model, added, mode.heads)}
            return args, kwargs

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if mode.heads is not None and not mode.narrowed:
                raise RuntimeError(
                    f"{name}: its attention is not PyTorch's scaled_dot_product_attention, nor "
                    "is a mask added to its scores, so what it sees cannot be narrowed, and its "
                    "windows cannot be checked"
                )
            mode.heads = None

        return hook

    try:
        for name, path in layers.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        kind = "eager" if written_out else "sdpa"
        with on_attention(model, kind) if of_transformers else nullcontext(), mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
