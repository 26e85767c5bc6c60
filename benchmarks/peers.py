"""Other ways to run the same model, in one process: eager, and transformers' compiled decode."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan

from . import models
from .ceilings import seconds
from .conditions import spread


@torch.inference_mode()
def measure(contexts: tuple[int, ...] | None = None, whole_graph: bool = False) -> dict[str, Any]:
    """Seconds of a prompt and of a decode step.

    Args:
        contexts: prompt lengths; 8,192 and 32,640 on a GPU.
        whole_graph: also our rewritten graph compiled as a whole (``link="fused"``), which takes a
            minute and more to compile.

    `eager` is transformers with PyTorch's fused attention; `static` its decode step on a static
    cache under ``torch.compile(mode="reduce-overhead")``; `adaskip` ours with an empty plan.
    """
    on_gpu = models.device().type == "cuda"
    contexts = contexts or ((8192, 32640) if on_gpu else (64,))
    model, compiled = models.pair()
    rows = []
    for context in contexts:
        ids = models.tokens(1, context)
        rows.append({"context": context, "peer": "adaskip", **_ours(compiled, ids)})
        rows.append({"context": context, "peer": "eager", **_eager(model, ids)})
        rows.append({"context": context, "peer": "static", **_static(model, ids)})
    if whole_graph:
        backend = "inductor" if on_gpu else "eager"
        fused = build(model, None, backend=backend, link="fused")
        for context in contexts:
            ids = models.tokens(1, context)
            rows.append({"context": context, "peer": "whole graph", **_ours(fused, ids)})
    return {"rows": rows}


def _ours(compiled: Any, ids: torch.Tensor) -> dict[str, Any]:
    runtime = runtime_of(compiled)
    runtime.plan = SkipPlan.empty(runtime.sublayers)
    caches: list[Any] = []

    def prompt() -> None:
        caches.clear()
        caches.append(runtime.new_cache(capacity=ids.shape[1] + 128))
        compiled(input_ids=ids, past_key_values=caches[0], logits_to_keep=1)

    prefill = seconds(prompt, ids.device, 3, 2)
    token = ids[:, :1].clone()
    decode = seconds(
        lambda: compiled(input_ids=token, past_key_values=caches[0]), ids.device, 30, 5
    )
    return {"prefill": spread(prefill), "decode": spread(decode)}


def _eager(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    model.set_attn_implementation("sdpa")
    caches: list[Any] = []

    def prompt() -> None:
        caches.clear()
        caches.append(DynamicCache(config=model.config))
        model(input_ids=ids, past_key_values=caches[0], logits_to_keep=1)

    prefill = seconds(prompt, ids.device, 3, 1)
    token = ids[:, :1].clone()
    decode = seconds(lambda: model(input_ids=token, past_key_values=caches[0]), ids.device, 10, 2)
    return {"prefill": spread(prefill), "decode": spread(decode)}


def _static(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    model.set_attn_implementation("sdpa")
    torch._dynamo.reset()
    context = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=-(-(context + 128) // 128) * 128)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = ids[:, :1].clone()

    def one() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        step(input_ids=token, past_key_values=cache, logits_to_keep=1)

    return {"decode": spread(seconds(one, ids.device, 20, 5))}
