"""The 8B shape: what it takes to verify a few tokens, and to draft one, against a decode step.

From these two times follows the speed-up for each rate of acceptance a, if all drafts stand alike
often: of k drafts 1 + a + ... + a**k tokens come in k drafts and a verification.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.kv_cache.drafting import Drafting
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows

from .. import models
from ..ceilings import seconds

#: Lengths, with the most that 8 tokens may take, in decode steps.
_ON_GPU = {8192: 1.05, 32768: 1.08, 131072 - 256: 1.10}
_TINY = {128: None, 512: None}
_VERIFIED = 8
#: Drafts with 2,048 tokens of a window; the most that a step may take, at the greatest length.
_TARGETS = {
    "half of the K/V heads windowed": 0.80,
    "7 of 8 K/V heads windowed": 0.60,
    "all layers windowed": 0.53,
    "all layers windowed, every second FFN skipped": 0.45,
}
_ACCEPTED = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_LONGEST = 16  # drafts before they are verified
#: What others have published of drafts by the model itself, at the rate that is marked.
_PUBLISHED = {0.9: "SWIFT 0.90 to 1.00 (arXiv 2410.06916), QuantSpec above 0.90 (arXiv 2502.10424)"}
#: Tokens a step of drafts that are looked up, of Llama-3.1-8B: replayed from the traces of
#: "Speculative Decoding: Performance or Illusion?" (arXiv 2601.11580), at most 5 drafts.
_LOOKED_UP = {"CNN": 1.38, "GSM8K": 1.18, "ShareGPT": 1.45, "InstructCoder": 2.29}


def plans(sublayers: Any, heads: int, tokens: int) -> dict[str, SkipPlan]:
    """Return the plans of drafts by name."""
    attention = [s for s in sublayers if s.kind == "attention"]
    ffns = [s for s in sublayers if s.kind == "ffn"]

    def windowed(full: tuple[int, ...], skipped: list[Any]) -> SkipPlan:
        window = Windows.of(attention, Window(tokens, full_heads=full))
        return SkipPlan.of(sublayers, skipped, windows=window)

    made = (
        windowed(tuple(range(0, heads, 2)), []),
        windowed((0,), []),
        windowed((), []),
        windowed((), ffns[1::2]),
    )
    return dict(zip(_TARGETS, made, strict=True))


@torch.inference_mode()
def rows(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows of each length: verification, drafts, and the speed-ups that follow.

    Args:
        name: of a model, which is for the other parts.
    """
    model, fast = models.pair()
    on_gpu = fast.device.type == "cuda"
    lengths: Mapping[int, float | None] = _ON_GPU if on_gpu else _TINY
    fast.adaskip.plan = empty = SkipPlan.empty(fast.adaskip.sublayers)
    drafts = plans(empty.sublayers, model.config.num_key_value_heads, 2048 if on_gpu else 16)
    for length, most in lengths.items():
        cache = fast.adaskip.new_cache(capacity=length + 128)
        fast(input_ids=models.tokens(1, length), past_key_values=cache, logits_to_keep=1)
        times = _times(fast, cache, drafts, 32 if on_gpu else 4)
        step, verified = times.pop("step"), times.pop("verify")
        yield _over(f"{_VERIFIED} tokens verified on {length}: decode step", verified, step, most)
        last = length == max(lengths) and on_gpu
        for plan, draft in times.items():
            target = _TARGETS[plan] if last else None
            yield _over(f"a draft on {length}, {plan}: decode step", draft, step, target)
        yield _looked_up(length, verified / step)
        for plan, draft in times.items():
            yield _speedups(f"{plan}, on {length}", draft / step, verified / step)
        del cache
        fast.adaskip.free()


def _times(
    fast: Any, cache: SkipCache, drafts: Mapping[str, SkipPlan], steps: int
) -> dict[str, float]:
    """Return the median seconds of a decode step, a verification and each kind of draft."""
    length, token, block = cache.length, models.tokens(1, 1), models.tokens(1, _VERIFIED)
    drafting = Drafting(length)

    def run(ids: torch.Tensor, plan: SkipPlan | None) -> None:
        drafting.plan = plan
        for _ in range(steps):
            fast(input_ids=ids, past_key_values=cache)
            if ids.shape[1] > 1:
                cache.keep_first(length)
        cache.keep_first(length)

    runs: dict[str, Callable[[], None]] = {
        "step": functools.partial(run, token, None),
        "verify": functools.partial(run, block, None),
        **{name: functools.partial(run, token, plan) for name, plan in drafts.items()},
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    with cache.verifying(drafting):
        for turn in range(4):  # they take turns, and the first sets things up
            for name, block_of in runs.items():
                (took,) = seconds(block_of, fast.device, 1, 0)
                if turn:
                    found[name].append(took / steps)
    return {name: statistics.median(took) for name, took in found.items()}


def _over(what: str, took: float, step: float, target: float | None) -> dict[str, Any]:
    notes = {"ms": 1000 * took, "step_ms": 1000 * step}
    return {"what": what, "ratio": took / step, "target": target, "notes": notes}


def _looked_up(length: int, verify: float) -> dict[str, Any]:
    """Return what published tokens a step of lookup would gain here."""
    found = {name: f"{tokens / verify:.2f}x" for name, tokens in _LOOKED_UP.items()}
    what = f"speed-up on {length} of drafts that are looked up, by texts of arXiv 2601.11580"
    return {"what": what, "ratio": None, "notes": found}


def _speedups(what: str, draft: float, verify: float) -> dict[str, Any]:
    """Return the best speed-up, and the number of drafts that gives it, by acceptance."""
    found = {}
    for accepted in _ACCEPTED:
        best = max((speedup(accepted, count, draft, verify), count) for count in range(1, _LONGEST))
        mark = f" <- {_PUBLISHED[accepted]}" if accepted in _PUBLISHED else ""
        found[f"{accepted:g}"] = f"{best[0]:.2f}x with {best[1]}{mark}"
    return {"what": f"speed-up by acceptance, {what}", "ratio": None, "notes": found}


def speedup(accepted: float, count: int, draft: float, verify: float) -> float:
    """Return tokens for the time of plain steps, in decode steps.

    Args:
        accepted: how likely a draft is to stand, if those before it do.
        count: drafts in a block.
        draft: what each takes.
        verify: what their verification takes.
    """
    return sum(accepted**i for i in range(count + 1)) / (count * draft + verify)
