"""What a compiled model is doing, as plain text: ``print(fast.adaskip)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..latency.terms import TableError
from ..plans.decisions import left_out, plans_of
from ..plans.skip_plan import Action, Phase, SkipPlan
from ..plans.tables import by_kind, storage

if TYPE_CHECKING:
    from ..kv_cache.cache import SkipCache
    from .runtime import Runtime

_INDENT = "  "


def runtime_report(runtime: Runtime) -> str:
    """Plans in use, live requests with their windows, what was compiled, and K/V storage.

    One aligned line for each; nothing is run and nothing is read from the device.
    """
    model = runtime.model
    dtype = str(model.dtype).removeprefix("torch.")
    rows = [
        ("model", f"{type(model).__name__}, {dtype} on {model.device}"),
        *_decision_rows(runtime),
        *_plan_rows("prefill", _first(runtime), "prefill"),
        *_policy_rows(runtime),
        *_draft_rows(runtime),
        ("online", _online(runtime)),
        *_request_rows(runtime),
        ("compiled", _compiled(runtime)),
        *_traced_rows(runtime),
        *_not_fixed_rows(runtime),
        *_checked_rows(runtime),
        ("K/V", _storage(runtime)),
        ("kept", _kept(runtime)),
    ]
    return _aligned(rows)


def _first(runtime: Runtime) -> SkipPlan:
    """The plan that requests begin with; of a choice, its first one."""
    return plans_of(runtime.plan)[0]


def _decision_rows(runtime: Runtime) -> list[tuple[str, str]]:
    decision = runtime.plan
    if isinstance(decision, SkipPlan):
        return []
    rows = [(f"{_INDENT}{name}", left_out(plan)) for name, plan in decision.rows()]
    return [(decision.kind, f"{decision.digest[:8]}, {len(rows)} plans"), *rows]


def _plan_rows(title: str, plan: SkipPlan, phase: Phase) -> list[tuple[str, str]]:
    skipped = plan.skipped(phase)
    heading = f"plan {plan.digest[:8]}, skips {len(skipped)} of {len(plan.sublayers)} sublayers"
    rows = [(title, heading)]
    if skipped:
        rows.append((f"{_INDENT}skipped", by_kind(skipped)))
    kept = [s for s in plan.sublayers if plan.action(phase, s) is Action.KV_ONLY]
    if kept:
        rows.append((f"{_INDENT}K/V only", by_kind(kept)))
    windows = plan.windows.of_phase(phase)
    for window in dict.fromkeys(windows.values()):
        rows.append((f"{_INDENT}{window}", by_kind(s for s, w in windows.items() if w == window)))
    return rows


def _policy_rows(runtime: Runtime) -> list[tuple[str, str]]:
    if runtime.describe is None:
        return []
    try:
        first, *more = runtime.describe(_first(runtime)).splitlines()
    except TableError as error:  # of a plan that was set since
        first, more = f"no prediction: {error}", []
    return [("policy", first), *(("", line) for line in more)]


def _draft_rows(runtime: Runtime) -> list[tuple[str, str]]:
    speculation = runtime.speculation
    if speculation is None:
        return []
    plan, (first, *more) = speculation.plan, str(speculation.stats).splitlines()
    skipped = plan.skipped("decode")
    heading = f"plan {plan.digest[:8]}, skips {len(skipped)} of {len(plan.sublayers)} sublayers"
    rows = [("drafts", heading if skipped or plan.windows else "no plan: looked up in the text")]
    if skipped:
        rows.append((f"{_INDENT}skipped", by_kind(skipped)))
    return [*rows, (f"{_INDENT}so far", first), *(("", line) for line in more)]


def _online(runtime: Runtime) -> str:
    policy = runtime.policy
    if runtime.speculation is not None:
        return "off: requests run in full"
    if not isinstance(runtime.plan, SkipPlan):
        return f"off: a {runtime.plan.kind} decides how decoding changes"
    if policy is None and runtime.describe is not None:
        return "off: the policy that chose the plan learns nothing"
    if policy is None:
        return "off: the plan was given, and there is no policy to change it"
    if not policy.online:
        return "off by the policy"
    if not _first(runtime).skipped("prefill"):
        return "off: prefill skips nothing, so there is nothing to compare with"
    return f"the first {policy.window} decoded tokens of a request are measured"


def _request_rows(runtime: Runtime) -> list[tuple[str, str]]:
    live = sorted(runtime.live_caches(), key=lambda cache: -cache.length)
    rows = [("requests", f"{len(live)} live")]
    for number, cache in enumerate(live, 1):
        rows.append((f"{_INDENT}{number}", _request(cache)))
        plan = cache.request.decode_plan if cache.request is not None else None
        if plan is not None:
            extra = (s for s in plan.skipped("decode") if s not in plan.prefill)
            total = f"skips {len(plan.skipped('decode'))} of {len(plan.sublayers)} sublayers"
            learned = by_kind(extra)
            written = [s for s in plan.sublayers if plan.action("decode", s) is Action.KV_ONLY]
            only = f"; K/V only: {by_kind(written)}" if written else ""
            more = f", on top of prefill's: {learned}" if learned else ", as prefill does"
            rows.append(
                (f"{_INDENT}{_INDENT}decode", f"plan {plan.digest[:8]}, {total}{more}{only}")
            )
    return rows


def _request(cache: SkipCache) -> str:
    batch = f"{cache.batch} x " if cache.batch > 1 else ""
    buffers = cache.lease.buffers
    lies = " head by head" if buffers is not None and buffers.by_head else ""
    return f"{batch}{cache.length:,} tokens stored{lies}, {_window(cache)}"


def _window(cache: SkipCache) -> str:
    request = cache.request
    if request is None or not request.decoding:
        return "window not open yet"
    window = request.window
    if window is None:
        return "window off"
    if window.closed:
        return f"window closed after {window.size}"
    return f"window {window.steps} of {window.size}"


def _compiled(runtime: Runtime) -> str:
    counters = runtime.counters
    return (
        f"{_count(counters.captures, 'graph')} captured, "
        f"{_count(runtime.pieces_compiled, 'piece')} compiled in {runtime.compile_seconds:.1f} s "
        f"({runtime.graphs.backend}), {_count(counters.links, 'program')} linked, "
        f"{counters.dropped} dropped"
    )


def _traced_rows(runtime: Runtime) -> list[tuple[str, str]]:
    return [("tracing", f"every layer, because {why}") for why in runtime.graphs.why_traced]


def _not_fixed_rows(runtime: Runtime) -> list[tuple[str, str]]:
    why = runtime.why_no_static_cache
    return [("decode", f"not as one CUDA graph, because {why}")] if why else []


def _checked_rows(runtime: Runtime) -> list[tuple[str, str]]:
    checker = runtime.checker
    if checker.worst is None:
        return []
    steps = _count(checker.compared, "step")
    return [("checked", f"{steps} against the eager model, largest error {checker.worst:.1e}")]


def _storage(runtime: Runtime) -> str:
    live = runtime.live_caches()
    full = sum(_full_bytes(cache) for cache in live)
    layers = len(runtime.graphs.specs)
    stored = {sum(cache.stored) for cache in live} or {layers}
    some = " or ".join(map(str, sorted(stored)))
    return (
        f"{storage(runtime.cache_bytes)} in live requests ({some} of {layers} layers); "
        f"{storage(full)} with all layers"
    )


def _kept(runtime: Runtime) -> str:
    held = {kind: pair for kind, pair in runtime.budget.held().items() if pair[0]}
    each = (f"{_count(n, kind[:-1])} {storage(size)}" for kind, (n, size) in held.items())
    total = storage(sum(size for _, size in held.values()))
    return f"{total} of at most {storage(runtime.budget.limit)}: {', '.join(each)}"


def _full_bytes(cache: SkipCache) -> int:
    """Bytes of a cache with the same room and K/V for every layer."""
    size = cache.dtype.itemsize
    return sum(spec.nbytes(cache.batch, cache.capacity, size) for spec in cache.specs)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title.ljust(width)}  {text}" for title, text in rows)
