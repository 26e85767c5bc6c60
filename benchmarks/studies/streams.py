"""The residual stream of a prompt, before the first sublayer and after each, under any plan."""

from __future__ import annotations

import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.programs.instruments import ResidualRecorder
from adaskip_fx.runtime.runtime import Runtime


def prompt_streams(
    runtime: Runtime, plan: SkipPlan, ids: torch.Tensor, keep: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [1, kept, V] and the streams, sublayers + 1 of [1, T, H], of a prompt int64 [1, T].

    keep: logits to make, of the last tokens; 0 for all.
    """
    recorder = ResidualRecorder()
    cache = runtime.new_cache(ids.shape[1], plan=plan, instrument=recorder)
    logits = runtime.step(ids, None, None, cache, keep)
    return logits, list(recorder.streams)


def cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """IO similarity of each token (AdaSkip, eq. 1), float32 [T], of streams [1, T, H]."""
    a, b = before[0].float(), after[0].float()
    return torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30)


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|actual - expected| / |expected| of each token, float32 [T], of streams [1, T, H]."""
    a, b = actual[0].float(), expected[0].float()
    norm = torch.linalg.vector_norm
    errors: torch.Tensor = norm(a - b, dim=-1) / norm(b, dim=-1).clamp_min(1e-30)
    return errors
