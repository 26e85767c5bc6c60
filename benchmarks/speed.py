"""Prefill and decode against their floors, with nothing skipped and with 8, 12 and 16 of 64."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan

from . import models
from .ceilings import MatrixRate, copy_rate, seconds
from .conditions import spread
from .floors import decode_bytes, prefill_flop

_ROUNDS, _WARMUP = 5, 5  # attention of a shape is planned when it has come a few times


def measure(batch: int = 1, contexts: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Seconds of a prompt and of a decode step through the compiled model, and their floors.

    A GPU's clock falls under load, and differently from one minute to the next. So a prompt of
    each plan and matrix products take turns, and a context's floors are those of the rates that
    were measured with it.

    Args:
        batch: rows.
        contexts: prompt lengths; 8,192 and 32,640 on a GPU.
    """
    device = models.device()
    contexts = contexts or ((8192, 32640) if device.type == "cuda" else (64, 256))
    model, compiled = models.pair()
    products = MatrixRate(device, model.dtype)
    sublayers = compiled.adaskip.sublayers
    counts = [len(sublayers) * n // 64 for n in (8, 12, 16)]
    plans = {n: models.random_plan(sublayers, n) for n in counts if n}
    plans = {0: SkipPlan.empty(sublayers), **plans}
    rows = []
    for context in contexts:
        took, rate = prompts(compiled, plans, batch, context, products)
        copied = copy_rate(device)
        rates = {"matrix_flop_per_s": rate, "copy_bytes_per_s": copied}
        full: dict[str, Any] = {}
        for skipped, plan in plans.items():
            row = {"context": context, "skipped": skipped, **rates}
            row |= {"prefill": spread(took[skipped]), **steps(compiled, plan, batch, context)}
            row["prefill_floor"] = prefill_flop(model, plan, context, batch) / rate
            row["decode_floor"] = decode_bytes(model, plan, context, batch) / copied
            full = full or row
            rows.append(row | _ratios(row, full))
    return {
        "model": {"layers": len(model.model.layers), "hidden": model.config.hidden_size},
        "dtype": str(model.dtype),
        "batch": batch,
        "ceilings": {
            **{key: statistics.median(row[key] for row in rows) for key in rates},
            "matrix_flop_per_s_burst": products.burst(),
        },
        "rows": rows,
    }


def _ratios(row: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, float]:
    """A row over its floors, and of what its plan promises, against the row of the full model."""
    found = {}
    for phase in ("prefill", "decode"):
        took, floor = row[phase]["median"], row[f"{phase}_floor"]
        found[f"{phase}_over_floor"] = took / floor
        if row is not full:
            speedup, promise = full[phase]["median"] / took, full[f"{phase}_floor"] / floor
            found[f"{phase}_promise"] = promise
            found[f"{phase}_speedup"] = speedup
            found[f"{phase}_kept_of_promise"] = speedup / promise
    return found


@torch.inference_mode()
def prompts(
    compiled: Any, plans: Mapping[int, SkipPlan], batch: int, context: int, products: MatrixRate
) -> tuple[dict[int, list[float]], float]:
    """Seconds of a prompt for each plan, round by round, and the matrix rate in these rounds."""
    ids = models.tokens(batch, context)
    took: dict[int, list[float]] = {skipped: [] for skipped in plans}
    rates = []
    for turn in range(_WARMUP + _ROUNDS):
        rate = products.sustained()
        if turn >= _WARMUP:
            rates.append(rate)
        for skipped, plan in plans.items():
            (one,) = seconds(_prompt(compiled, plan, ids, []), compiled.device, 1, 0)
            if turn >= _WARMUP:
                took[skipped].append(one)
    return took, statistics.median(rates)


def _prompt(
    compiled: Any, plan: SkipPlan, ids: torch.Tensor, held: list[Any]
) -> Callable[[], None]:
    """A request that runs a prompt; its cache is held in `held`."""
    runtime = runtime_of(compiled)

    def prompt() -> None:
        runtime.plan = plan
        held.append(runtime.new_cache(capacity=ids.shape[1] + 128))
        compiled(input_ids=ids, past_key_values=held[0], logits_to_keep=1)

    return prompt


@torch.inference_mode()
def steps(compiled: Any, plan: SkipPlan, batch: int, context: int) -> dict[str, Any]:
    """Seconds of a decode step, and what the request stores."""
    device, ids, held = compiled.device, models.tokens(batch, context), list[Any]()
    _prompt(compiled, plan, ids, held)()
    cache, token = held[0], ids[:, :1].clone()

    def step() -> None:
        compiled(input_ids=token, past_key_values=cache)

    decode = seconds(step, device, repeats=40, warmup=6)
    stored = sum(cache.stored)
    result = {
        "decode": spread(decode),
        "kv_bytes": cache.nbytes,
        "kv_layers": stored,
        "kv_share": stored / len(cache.stored),
    }
    if device.type == "cuda":
        step = cache.lease.buffers.steps[1]
        graph = step._recordings[cache.request.bindings[1, plan].program].graph.graph
        position = step.inputs.position
        position.fill_(context)

        def replay() -> None:
            graph.replay()

        result["decode_replay"] = spread(seconds(replay, device, repeats=20, warmup=3))
        step.inputs._position_at = None
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
