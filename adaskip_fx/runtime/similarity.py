"""Measure how much each sublayer of the full model changes the residual stream of a prompt."""

from __future__ import annotations

import torch

from ..plans.skip_plan import SkipPlan
from ..programs.instruments import LayerProbe
from . import turns
from .inputs import Inputs
from .runtime import Runtime


def measure_prompt(
    runtime: Runtime,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    layers: bool = False,
) -> torch.Tensor:
    """Return the similarity statistics of the sublayers over a prompt, [sublayers, B, 5].

    Args:
        runtime: That of a compiled model; nothing is skipped, whatever its plan.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 at padding, which counts for nothing.
        layers: Whether those of whole layers follow, [sublayers + layers, B, 5].

    Raises:
        ValueError: The prompt is longer than the model's positions.
    """
    turns.check_length(runtime.graphs, input_ids.shape[1])
    full = SkipPlan.empty(runtime.sublayers)
    instrument = LayerProbe() if layers else None
    cache = runtime.new_cache(input_ids.shape[1], plan=full, learn=False, instrument=instrument)
    turns.begin(cache, runtime.graphs)
    inputs = Inputs(input_ids, attention_mask)
    _, statistics = runtime.runner.run(
        "prefill", cache.request, full, runtime.sublayers, inputs, cache, 1
    )
    assert statistics is not None, "every sublayer is probed"
    return statistics
