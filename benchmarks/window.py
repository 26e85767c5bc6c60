"""What measuring costs: probes in the decode window, and calibration against plain prompts."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.runtime.similarity import measure_prompt
from adaskip_fx.runtime.window import Window, probed_in_decode

from . import models
from .ceilings import seconds


@torch.inference_mode()
def measure(context: int | None = None, prompt: int | None = None) -> dict[str, Any]:
    """Step time with every kept FFN probed over step time without; likewise for prompts.

    Calibration runs the instrumented full model on 16 prompts, as :func:`adaskip_fx.calibrate`
    does, but for the tokenizer.
    """
    device = models.device()
    on_gpu = device.type == "cuda"
    context, prompt = context or (8192 if on_gpu else 64), prompt or (4096 if on_gpu else 64)
    _, compiled = models.pair()
    runtime = runtime_of(compiled)
    runtime.plan = models.random_plan(runtime.sublayers, len(runtime.sublayers) // 8)
    cache = runtime.new_cache(capacity=context + 256)
    ids = models.tokens(1, context)
    compiled(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1].clone()
    probed = probed_in_decode(runtime.plan)

    def step() -> None:
        compiled(input_ids=token, past_key_values=cache)

    plain = statistics.median(seconds(step, device, 40, 5))
    cache.request.decode.window = Window(probed, size=1 << 30)
    with_probes = statistics.median(seconds(step, device, 40, 5))
    cache = None
    text = models.tokens(1, prompt)

    def plain_prompts() -> None:
        for _ in range(16):
            one = runtime.new_cache(capacity=prompt, plan=runtime.plan.empty(runtime.sublayers))
            compiled(input_ids=text, past_key_values=one, logits_to_keep=1)
            del one

    def measured_prompts() -> None:
        for _ in range(16):
            measure_prompt(runtime, text)[:, 0].double().cpu()

    prompts = statistics.median(seconds(plain_prompts, device, 2, 1))
    calibration = statistics.median(seconds(measured_prompts, device, 2, 1))
    return {
        "context": context,
        "probed": len(probed),
        "step_s": plain,
        "probed_step_s": with_probes,
        "probed_over_plain": with_probes / plain,
        "prompt": prompt,
        "prompts_s": prompts,
        "calibration_s": calibration,
        "calibration_over_prompts": calibration / prompts,
    }
