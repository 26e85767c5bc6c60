"""Attention that sees windows: what they save of a prompt and of a step, of what they promise.

Windows of 2,048 tokens and 4 sinks, in half of the layers, in half of all K/V heads, and in half of
the layers with a sixteenth of the FFNs skipped. The promise is the difference of the floors, which
count what a window sees; `saved` is the measured difference over it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows

from . import models, speed
from .ceilings import MatrixRate, copy_rate, seconds, synchronize
from .floors import decode_bytes, kv_bytes, prefill_flop

#: Contexts on a GPU, and how often a prompt runs there before it is timed, and is timed. (Attention
#: of half of the heads has a plan of cuDNN's from the sixth prompt of 8,192 tokens on.)
_ON_GPU = {8192: (6, 5), 32768: (1, 2), 130816: (1, 1)}
_TINY = {64: (0, 1), 128: (0, 1)}


def measure() -> dict[str, Any]:
    """Return for each context and plan the seconds of a prompt and of a step, and their floors."""
    device = models.device()
    on_gpu = device.type == "cuda"
    model, compiled = models.pair()
    tokens = 2048 if on_gpu else 16
    every = plans(compiled.adaskip.sublayers, model.config.num_key_value_heads, tokens)
    products, rows = MatrixRate(device, model.dtype), list[dict[str, Any]]()
    for context, (before, rounds) in (_ON_GPU if on_gpu else _TINY).items():
        took, rate = _prompts(compiled, every, context, before, rounds, products)
        copied, full = copy_rate(device), dict[str, float]()
        for name, plan in every.items():
            step = speed.steps(compiled, plan, 1, context)
            compiled.adaskip.free()
            row = {
                "prefill": took[name],
                "decode": step["decode"]["median"],
                "decode_replay": step.get("decode_replay", step["decode"])["median"],
                "prefill_floor": prefill_flop(model, plan, context) / rate,
                "decode_floor": decode_bytes(model, plan, context) / copied,
            }
            full = full or row
            rows.append({"context": context, "plan": name, **row, **_saved(row, full)})
    return {
        "model": {"layers": model.config.num_hidden_layers, "hidden": model.config.hidden_size},
        "dtype": str(model.dtype),
        "window": tokens,
        "rows": rows,
        "new_windows_ms": _new_windows(compiled, every["nothing"], tokens),
        "kv_bytes": _memory(model, compiled, every, sorted(_ON_GPU if on_gpu else _TINY)[-2]),
    }


def plans(sublayers: Any, heads: int, tokens: int) -> dict[str, SkipPlan]:
    """Return the plans by name; the first has no window."""
    attention = [s for s in sublayers if s.kind == "attention"]
    ffns = [s for s in sublayers if s.kind == "ffn"]
    empty, halves = SkipPlan.empty(sublayers), attention[1::2]
    layers = Windows.of(halves, Window(tokens))
    by_head = Windows.of(attention, Window(tokens, full_heads=tuple(range(0, heads, 2))))
    skipped = ffns[2 : -2 : max(1, len(ffns) // 8)][: max(1, len(ffns) // 8)]
    return {
        "nothing": empty,
        "half of the layers": empty.with_windows(layers),
        "half of the heads": empty.with_windows(by_head),
        f"half of the layers, {len(skipped)} FFNs skipped": SkipPlan.of(
            sublayers, skipped, windows=layers
        ),
    }


@torch.inference_mode()
def _prompts(
    compiled: Any,
    every: Mapping[str, SkipPlan],
    context: int,
    before: int,
    rounds: int,
    products: MatrixRate,
) -> tuple[dict[str, float], float]:
    """Return the median seconds of a prompt under each plan, which take turns with products."""
    ids, rates = models.tokens(1, context), list[float]()
    took: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(before + rounds):
        rates.append(products.sustained())
        for name, plan in every.items():
            run = speed._prompt(compiled, plan, ids, [])
            (one,) = seconds(run, compiled.device, 1, 0)
            if turn >= before:
                took[name].append(one)
    return {n: statistics.median(t) for n, t in took.items()}, statistics.median(rates)


def _saved(row: Mapping[str, float], full: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for phase in ("prefill", "decode"):
        promised = full[f"{phase}_floor"] - row[f"{phase}_floor"]
        if promised > 0:
            found[f"{phase}_saved"] = (full[phase] - row[phase]) / promised
            found[f"{phase}_speedup"] = full[phase] / row[phase]
    return found


@torch.inference_mode()
def _new_windows(compiled: Any, empty: SkipPlan, tokens: int) -> list[float]:
    """Return milliseconds of decode steps of a running request whose windows are new."""
    runtime_of(compiled).plan = empty
    cache, times = compiled.adaskip.new_cache(), list[float]()
    token = models.tokens(1, 1)
    compiled(input_ids=models.tokens(1, 4 * tokens), past_key_values=cache, logits_to_keep=1)
    attention = [s for s in empty.sublayers if s.kind == "attention"]
    for number in range(6):
        window = Window(tokens - number, full_heads=(number % 2,))
        windows = Windows(decode=dict.fromkeys(attention[number:], window))
        cache.request.decode_with(replace(empty, windows=windows))

        def step() -> None:
            compiled(input_ids=token, past_key_values=cache)

        synchronize(compiled.device)
        (took,) = seconds(step, compiled.device, 1, 0)
        times.append(1000 * took)
    return times


@torch.inference_mode()
def _memory(
    model: Any, compiled: Any, every: Mapping[str, SkipPlan], context: int
) -> list[dict[str, Any]]:
    """Return the bytes that a request holds under each plan, and those that it needs."""
    found = []
    for name, plan in every.items():
        cache = compiled.adaskip.new_cache(plan=plan)
        ids = models.tokens(1, context)
        for part in (ids, ids[:, :1], ids[:, :1]):
            compiled(input_ids=part, past_key_values=cache, logits_to_keep=1)
        needed = kv_bytes(model, plan, cache.length)
        found.append(
            {"context": context, "plan": name, "held": float(cache.nbytes), "needed": needed}
        )
        del cache
        compiled.adaskip.free()
    return found


def summary(result: Mapping[str, Any]) -> str:
    """Return the rows as a short table."""
    lines = [
        f"context {'plan':36s} prefill/s speedup saved  decode/ms replay/ms speedup saved   "
        f"(window {result['window']})"
    ]
    for row in result["rows"]:
        cells = [f"{row['context']:7d} {row['plan']:36s} {row['prefill']:9.4f}"]
        cells += [f"{row.get(f'prefill_{what}', 0):7.3f}" for what in ("speedup", "saved")]
        cells += [f"{1000 * row['decode']:8.3f} {1000 * row['decode_replay']:8.3f}"]
        cells += [f"{row.get(f'decode_{what}', 0):7.3f}" for what in ("speedup", "saved")]
        lines.append(" ".join(cells))
    for row in result["kv_bytes"]:
        held, needed = (row[key] / 2**20 for key in ("held", "needed"))
        lines.append(
            f"{row['context']:7d} {row['plan']:36s} K/V {held:.1f} MiB held, {needed:.1f} needed"
        )
    new = ", ".join(f"{took:.1f}" for took in result["new_windows_ms"])
    return "\n".join([*lines, f"steps with new windows: {new} ms"])
