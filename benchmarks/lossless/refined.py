"""Ways to choose the plan of drafts, on the same stories: which gives most tokens for its time.

`given` drafts with the plan of AdaSkip's policy, `several` with the best by measured time of that
plan and of ones that leave out half and a quarter of it, `swift` searches while it writes, and
`knapspec` takes the knapsack of counted times. Nothing else drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import adaskip_fx
from adaskip_fx.data.reference_text import calibration_samples, prompt_ids
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.model.load import load, packaged_model, usable_backend
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.programs.counted_times import counted_times
from adaskip_fx.runtime.draft_with import draft_with
from adaskip_fx.speculation.frontier import weaker_plans
from adaskip_fx.speculation.knapsack import KnapSpec
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.swift import Swift

from . import tasks


@dataclass(frozen=True)
class Sizes:
    """How much is asked for: tokens of an answer at most, stories, tokens to calibrate on."""

    new: int
    stories: int
    calibrated: int


_ON_GPU = Sizes(new=1024, stories=4, calibrated=1024)
_ELSEWHERE = Sizes(new=192, stories=2, calibrated=256)
_ALPHA = 1.2  # 10 of 60 sublayers


def rows(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row for each way: the time of plain tokens over that of drafted ones.

    Args:
        name: of the model; None for SmolLM2-135M-Instruct of the installed package.
    """
    small = load(name or str(packaged_model()))
    sizes = _ON_GPU if small.model.device.type == "cuda" else _ELSEWHERE
    backend, _ = usable_backend("inductor", small.model.device)
    texts = calibration_samples(None, sizes.calibrated, 4)
    profile = adaskip_fx.calibrate(small.model, small.tokenizer, texts, sizes.calibrated)
    how: dict[str, Any] = {"alpha": _ALPHA, "backend": backend}
    fast = adaskip_fx.compile(small.model, profile, decoding=Lossless((Skipped(),)), **how)
    runtime = runtime_of(fast)
    assert runtime.speculation is not None
    plan = runtime.speculation.plan
    prompts = [
        torch.tensor([prompt_ids(small.tokenizer, text)], device=small.model.device)
        for text in tasks.prompts("stories", sizes.stories, 0)
    ]
    fast.adaskip.warmup(max(ids.shape[1] for ids in prompts) + sizes.new)
    runtime.speculation = None
    plain = _seconds(fast, prompts, sizes.new)
    for way, decoding in _ways(runtime, plan, profile, prompts[0].shape[1] + sizes.new).items():
        runtime.set_plan(plan)
        draft_with(runtime, decoding)
        speculation = runtime.speculation
        took = _seconds(fast, prompts, sizes.new)
        stats = speculation.stats
        searches = speculation._refinements.values()
        yield {
            "what": f"stories of up to {sizes.new} tokens, {way}: plain over drafted",
            "ratio": plain / took,
            "notes": {
                "tokens_per_step": stats.tokens_per_step,
                "acceptance": {
                    n: [round(share, 2) for share in proposed.acceptance[:4]]
                    for n, proposed in stats.proposers.items()
                },
                "tried": sum(getattr(search, "tried", 0) for search in searches),
                "matchness": [getattr(search, "best", None) for search in searches],
            },
        }


def _ways(runtime: Any, plan: SkipPlan, profile: Any, context: int) -> dict[str, Lossless]:
    """Return what each way decodes with."""
    similarity = dict(zip(profile.sublayers, profile.similarity().tolist(), strict=True))
    half, quarter, *_ = weaker_plans(plan, similarity)
    table = counted_times(runtime.graphs, context)
    return {
        "given": Lossless((Skipped(),)),
        "several": Lossless((Skipped(plan), Skipped(half), Skipped(quarter))),
        "swift": Lossless((Skipped(refine=Swift()),)),
        "knapspec": Lossless((Skipped(refine=KnapSpec(table)),)),
    }


def _seconds(fast: Any, prompts: list[torch.Tensor], new: int) -> float:
    """Return the seconds of a token of each answer, after one that sets things up."""
    tasks.answer(fast, prompts[0], new)
    return sum(tasks.answer(fast, ids, new)[0] for ids in prompts)
