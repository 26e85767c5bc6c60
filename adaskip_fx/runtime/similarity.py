"""Measure how much each sublayer of the full model changes the residual stream of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plans.skip_plan import SkipPlan
from ..plans.windows import Window
from ..programs.instruments import Instrument, LayerProbe, WindowProbe
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
    return _measured(runtime, input_ids, attention_mask, LayerProbe() if layers else None)


def measure_windows(
    runtime: Runtime,
    input_ids: torch.Tensor,
    windows: Sequence[Window],
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `measure_prompt` does with layers, and what windows would do to K/V heads.

    That is float32 [K/V heads, windows, B, 3], sums of `WINDOW_STATS` for the heads of
    ``runtime.graphs.structure.kv_heads``, of one run of the prompt.

    Args:
        runtime: As for `measure_prompt`.
        input_ids: int64 [B, T].
        windows: At least one.
        attention_mask: [B, T], 0 at padding, which counts for nothing.

    Raises:
        ValueError: The prompt is longer than the model's positions.
        UnsupportedError: An attention that may have windows cannot be measured.
    """
    structure = runtime.graphs.structure
    heads = structure.kv_heads
    positions = tuple(i for i, s in enumerate(structure.sublayers) if s in heads)
    probe = WindowProbe(positions, tuple((w.sinks, w.tokens) for w in windows))
    statistics = _measured(runtime, input_ids, attention_mask, probe)
    assert probe.reading is not None, "the program measures windows"
    return statistics, probe.reading


def _measured(
    runtime: Runtime,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    instrument: Instrument | None,
) -> torch.Tensor:
    turns.check_length(runtime.graphs, input_ids.shape[1])
    full = SkipPlan.empty(runtime.sublayers)
    cache = runtime.new_cache(input_ids.shape[1], plan=full, learn=False, instrument=instrument)
    turns.begin(cache, runtime.graphs)
    inputs = Inputs(input_ids, attention_mask)
    with runtime.ranks.step():
        _, statistics = runtime.runner.run(
            "prefill", cache.request, full, runtime.sublayers, inputs, cache, 1
        )
    assert statistics is not None, "every sublayer is probed"
    return statistics
