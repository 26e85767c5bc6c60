"""What `speed` and `plans` measure at length, in short: one row, nothing padded, nothing grown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .. import plans, speed
from ..floors import decode_bytes, prefill_flop
from .bench import Bench
from .rows import Row, over


def main_road(bench: Bench) -> Iterator[Row]:
    """A decode step and a prompt over their floors, and a plan that was never seen."""
    sizes, model, fast, plan = bench.sizes, bench.model, bench.fast, bench.plan
    error = bench.eager_error((sizes.compared, 1))
    for context, target in ((sizes.short, 1.10), (sizes.long, 1.06)):
        took = speed.steps(fast, plan, 1, context)["decode"]["median"]
        floor = decode_bytes(model, plan, context) / bench.copy_rate()
        what = f"step at {context}: floor"
        yield over(what, took, floor, target, eager_error=error)
        bench.begin()
    prompts, rate = speed.prompts(fast, {0: plan}, 1, sizes.short, bench.products)
    floor = prefill_flop(model, plan, sizes.short) / rate
    what = f"prompt of {sizes.short}: floor"
    yield over(what, statistics.median(prompts[0]), floor, 1.15, eager_error=error)
    bench.begin()
    new = plans.measure(context=sizes.short, repeats=sizes.new_plans)
    step = new["step_with_new_plan_ms"]
    notes = {"median_ms": step["median"], "new_captures": new["new_captures"]}
    what = f"step at {sizes.short} with a new plan (largest of {step['repeats']})"
    yield Row(what, step["max"], new["step_ms"]["median"], 60, of="measured", notes=notes)
