"""Prefill and decode against their floors, with nothing skipped and with 8, 12 and 16 of 64."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from adaskip_fx.plan import SkipPlan

from . import models
from .ceilings import ceilings, seconds
from .conditions import spread
from .floors import decode_bytes, prefill_flop


def measure(batch: int = 1, contexts: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Seconds of a prompt and of a decode step through the compiled model, and their floors.

    Args:
        batch: rows.
        contexts: prompt lengths; 8,192 and 32,640 on a GPU.
    """
    device = models.device()
    on_gpu = device.type == "cuda"
    contexts = contexts or ((8192, 32640) if on_gpu else (64, 256))
    model, compiled = models.pair()
    top = ceilings(device, model.dtype)
    sublayers = compiled.adaskip.sublayers
    empty = SkipPlan.empty(sublayers)
    counts = [len(sublayers) * n // 64 for n in (8, 12, 16)]
    plans = {0: empty, **{n: models.random_plan(sublayers, n) for n in counts if n}}
    rows = []
    for context in contexts:
        full: dict[str, float] = {}
        for skipped, plan in plans.items():
            row = _row(compiled, plan, batch, context)
            row["skipped"] = skipped
            floors = {
                "prefill": prefill_flop(model, plan, context, batch) / top["matrix_flop_per_s"],
                "decode": decode_bytes(model, plan, context, batch) / top["copy_bytes_per_s"],
            }
            for phase, floor in floors.items():
                took = row[phase]["median"]
                row[f"{phase}_floor"] = floor
                row[f"{phase}_over_floor"] = took / floor
                if plan is empty:
                    full[phase], full[f"{phase}_floor"] = took, floor
                else:
                    promise = full[f"{phase}_floor"] / floor
                    row[f"{phase}_promise"] = promise
                    row[f"{phase}_speedup"] = full[phase] / took
                    row[f"{phase}_kept_of_promise"] = full[phase] / took / promise
            rows.append(row)
    return {
        "model": {"layers": len(model.model.layers), "hidden": model.config.hidden_size},
        "dtype": str(model.dtype),
        "batch": batch,
        "ceilings": top,
        "rows": rows,
    }


@torch.inference_mode()
def _row(compiled: Any, plan: SkipPlan, batch: int, context: int) -> dict[str, Any]:
    runtime, device = compiled.adaskip, compiled.device
    runtime.plan = plan
    ids = models.tokens(batch, context)
    held: list[Any] = []

    def prompt() -> None:
        held.clear()  # the request before this one has ended
        held.append(runtime.new_cache(capacity=context + 128))
        compiled(input_ids=ids, past_key_values=held[0], logits_to_keep=1)

    prefill = seconds(prompt, device, repeats=5, warmup=2)
    cache, token = held[0], ids[:, :1].clone()

    def step() -> None:
        compiled(input_ids=token, past_key_values=cache)

    decode = seconds(step, device, repeats=40, warmup=6)
    bytes_held = cache.nbytes
    stored = sum(cache.stored)
    result = {
        "context": context,
        "prefill": spread(prefill),
        "decode": spread(decode),
        "kv_bytes": bytes_held,
        "kv_layers": stored,
        "kv_share": stored / len(cache.stored),
    }
    if device.type == "cuda":
        graph = cache._storage.decoder._recordings[cache.request.lane.program].graph
        position = cache._storage.decoder.position
        position.fill_(context)

        def replay() -> None:
            graph.replay()

        result["decode_replay"] = spread(seconds(replay, device, repeats=20, warmup=3))
        cache._storage.decoder._position_at = None
    return result


def summary(result: dict[str, Any]) -> str:
    """The rows as a short table."""
    lines = ["context skipped prefill/s x-floor kept  decode/ms x-floor kept"]
    for row in result["rows"]:
        decode = 1000 * statistics.fmean([row["decode"]["median"]])
        lines.append(
            f"{row['context']:7d} {row['skipped']:7d} {row['prefill']['median']:9.4f} "
            f"{row['prefill_over_floor']:7.3f} {row.get('prefill_kept_of_promise', 1):5.3f} "
            f"{decode:9.3f} {row['decode_over_floor']:7.3f} "
            f"{row.get('decode_kept_of_promise', 1):5.3f} "
            f"replay {1000 * row.get('decode_replay', {}).get('median', 0):.3f}"
        )
    return "\n".join(lines)
