"""All policies: what each costs in quality, against how fast it is on this device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from adaskip_fx.plans.decision_files import load_decision
from adaskip_fx.plans.skip_plan import SkipPlan

from .choices import Choice, chosen_policies, left_out, plans_in
from .fits import chosen_surrogates
from .quality import costs, decode_costs
from .setup import Options, Subject, open_subject
from .timing import measure_times

PICTURES = ("pareto", "plans")
_DECODED = 4  # windows whose end is decoded token by token; one on a CPU
_ROUNDS = 3  # of timing
_ROWS = 8  # prompts of a prefill that is timed, on a GPU
_USUAL = ("none", "scale", "linear")  # surrogates, if no others are asked for
Candidate = tuple[dict[str, Any], Any]


def measure(options: Options) -> dict[str, Any]:
    """Points and plans of all policies, as published and with our surrogates."""
    subject = open_subject(options, timed=True)
    return {**subject.about(), **pareto(subject, chosen_policies(options.policies))}


def pareto(subject: Subject, policies: Sequence[Choice]) -> dict[str, Any]:
    """Points and plans as the pictures take them.

    Calibrated on the first text, evaluated on the last; saved plans are added. Each phase has a
    quality of its own. Where a prompt's last token runs as in decode, nobody reads what the others
    predict: its quality is decoding's. What AdaSkip adds online depends on the request and is in
    neither.
    """
    refused: list[dict[str, Any]] = []
    candidates: list[Candidate] = []
    for policy in policies:
        found = candidates_of(subject, policy, refused)
        _say(f"{policy.name}: {len(found)} plans")
        candidates += found
    candidates += [_saved(name, load_decision(path)) for name, path in subject.options.plans]
    plans = [plan for _, plan in candidates]
    windows = subject.windows(subject.texts[-1], "second")
    _say(f"what {len(plans)} plans lose, and how fast they are")
    on_gpu = subject.device.type == "cuda"
    few = windows[: _DECODED if on_gpu else 1]
    by_phase = {
        "prefill": costs(subject.runtime, plans, windows),
        "decode": decode_costs(subject.runtime, plans, few, subject.decoded),
    }
    everything = [SkipPlan.empty(subject.runtime.sublayers), *plans]
    rows = _ROWS if on_gpu else 1
    times = measure_times(subject.runtime, everything, windows[0], subject.decoded, _ROUNDS, rows)
    points = []
    for i, (about, plan) in enumerate(candidates):
        lost = {phase: own[i].against(full) for phase, (full, own) in by_phase.items()}
        points.append(
            {
                **about,
                "skipped": len(left_out(plans_in(plan)[-1])),
                "speedup": times[i + 1].speedup(times[0]),
                "quality": _quality(plan, lost),
                "costs": lost,
            }
        )
    return {
        "quality_name": f"perplexity ratio on {subject.texts[-1].name}",
        "lower_is_better": True,
        "calibrated_on": subject.texts[0].name,
        "evaluated_on": subject.texts[-1].name,
        "context": subject.length,
        "prefill_rows": rows,
        "full": {
            "perplexity": {phase: full.perplexity for phase, (full, _) in by_phase.items()},
            "prefill_seconds": times[0].prefill,
            "decode_seconds": times[0].decode,
        },
        "points": points,
        "refused": refused,
        "plans": [p for about, plan in candidates for p in named_plans(about, plan)],
    }


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _saved(name: str, plan: Any) -> Candidate:
    """A plan that was made elsewhere, named as what it stands for."""
    last = plans_in(plan)[-1]
    kind = last.surrogates.kinds
    about = {"policy": name, "variant": "", "alpha": None, "compensation": kind}
    return {**about, "published": True, "plan": last.digest}, plan


def _quality(plan: Any, found: dict[str, dict[str, float]]) -> dict[str, float]:
    ratios = {phase: cost["perplexity_ratio"] for phase, cost in found.items()}
    if plans_in(plan)[0].last_token_full:
        ratios["prefill"] = ratios["decode"]
    return ratios


def candidates_of(
    subject: Subject, policy: Choice, refused: list[dict[str, Any]]
) -> list[Candidate]:
    """A policy's plans at every alpha: as published, then with our surrogates.

    Plans that do the same are kept once. What a policy refuses is added to `refused`.
    """
    text = subject.texts[0]
    profile, windows = subject.profile(text), subject.windows(text, "first")
    wanted = subject.options.surrogates
    found: dict[str, Candidate] = {}
    for alpha in subject.options.alphas:
        try:
            published = policy.published(subject, profile, alpha, windows)
            ours = policy.ours(subject, profile, alpha, windows)
        except ValueError as error:
            refused.append({"policy": policy.name, "alpha": alpha, "why": str(error)})
            continue
        kind = plans_in(published)[-1].surrogates.kinds
        variants = [("", kind, published)]
        if isinstance(ours, SkipPlan):
            for name, fit in chosen_surrogates(wanted, _USUAL).items():
                fitted = fit(subject, text, left_out(ours))
                variants.append((policy.variant, name, ours.with_surrogates(fitted)))
        else:
            kind = plans_in(ours)[-1].surrogates.kinds
            variants.append((policy.variant, kind, ours))
        for variant, kind, plan in variants:
            about = {
                "policy": policy.name,
                "variant": variant,
                "alpha": alpha,
                "compensation": kind,
                "published": plan is published,
                "plan": plan.digest,
            }
            found.setdefault(what_runs(plan), (about, plan))
    return list(found.values())


def what_runs(plan: Any) -> str:
    """Equal for plans that run the same programs, whatever else they say."""
    if not isinstance(plan, SkipPlan):
        return str(plan.digest)
    return f"{plan.phase_digest('prefill')} {plan.phase_digest('decode')}"


def named_plans(about: dict[str, Any], plan: Any) -> list[dict[str, Any]]:
    """A published plan as plan maps take it; of a schedule its first and its last."""
    if not about["published"]:
        return []
    first, *_, last = (*plans_in(plan), plans_in(plan)[-1])
    name = f"{about['policy']}, {len(left_out(last))}"
    if first == last:
        return [{"name": name, **first.to_json()}]
    ends = zip(("at first", "at last"), (first, last), strict=True)
    return [{"name": f"{name} {when}", **one.to_json()} for when, one in ends]


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    return "\n".join(
        f"{p['policy']}{', ' * bool(p['variant'])}{p['variant']} ({p['compensation']}), "
        f"{p['skipped']} skipped: "
        + ", ".join(
            f"{phase} {p['speedup'][phase]:.2f}x at perplexity {cost['perplexity_ratio']:.3f}x, "
            f"KL {cost['kl']:.3f}"
            for phase, cost in p["costs"].items()
        )
        for p in result["points"]
    )
