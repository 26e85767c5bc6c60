"""All policies: what each costs in quality, against how fast it is on this device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adaskip_fx.plan import SkipPlan

from .choices import POLICIES, Choice, chosen_compensations, compensated
from .quality import costs
from .setup import Options, Subject, open_subject
from .timing import Times, measure_times

PICTURES = ("pareto", "plans")


def measure(options: Options) -> dict[str, Any]:
    """Points and plans of all policies, as published and with our compensations."""
    subject = open_subject(options, timed=True)
    return {**subject.about(), **pareto(subject, POLICIES)}


def pareto(subject: Subject, policies: Sequence[Choice]) -> dict[str, Any]:
    """Points and plans as the pictures take them.

    Calibrated on the first text, evaluated on the last. Quality is that of the prefill's plan;
    what decode adds online depends on the request and is not in it.
    """
    candidates = [c for policy in policies for c in candidates_of(subject, policy)]
    plans = [plan for _, plan in candidates]
    evaluation = subject.windows(subject.texts[-1], "second")
    full, found = costs(subject.runtime, plans, evaluation)
    on_gpu = subject.device.type == "cuda"
    empty = SkipPlan.empty(subject.runtime.sublayers)
    steps, rounds = (24, 3) if on_gpu else (3, 1)
    times = measure_times(subject.runtime, [empty, *plans], evaluation[0], steps, rounds)
    points = []
    for (about, plan), cost, own in zip(candidates, found, times[1:], strict=True):
        quality = cost.against(full)
        point = {
            **about,
            "skipped": len(plan.skipped("prefill")),
            "speedup": own.speedup(times[0]),
            "quality": quality["perplexity_ratio"],
            **quality,
        }
        points.append(point)
    return {
        "quality_name": f"perplexity ratio on {subject.texts[-1].name}",
        "lower_is_better": True,
        "calibrated_on": subject.texts[0].name,
        "evaluated_on": subject.texts[-1].name,
        "context": subject.length,
        "full": {"perplexity": full.perplexity, **_seconds(times[0])},
        "points": points,
        "plans": [named_plan(about, plan) for about, plan in candidates if about["published"]],
    }


def candidates_of(subject: Subject, policy: Choice) -> list[tuple[dict[str, Any], SkipPlan]]:
    """A policy's plans at every alpha that it can serve: as published, then with ours.

    Plans that run the same programs are kept once.
    """
    text = subject.texts[0]
    profile, windows = subject.profile(text), subject.windows(text, "first")
    found: dict[tuple[str, str], tuple[dict[str, Any], SkipPlan]] = {}
    for alpha in subject.options.alphas:
        published = policy.published(subject, profile, alpha, windows)
        variants: list[tuple[SkipPlan, str, bool]] = [
            (published, published.compensation.kind, True)
        ]
        for name, fit in chosen_compensations(subject.options.compensations).items():
            ours = policy.ours(subject, profile, alpha, windows)
            fitted = fit(subject, profile, ours.skipped("prefill"), windows)
            variants.append((compensated(ours, fitted), name, False))
        for plan, kind, as_published in variants:
            about = {
                "policy": policy.name if as_published else policy.our_name,
                "alpha": alpha,
                "compensation": kind,
                "published": as_published,
                "plan": plan.digest,
            }
            found.setdefault(
                (plan.phase_digest("prefill"), plan.phase_digest("decode")), (about, plan)
            )
    return list(found.values())


def named_plan(about: dict[str, Any], plan: SkipPlan) -> dict[str, Any]:
    """A plan as plan maps take it."""
    name = f"{about['policy']}, {len(plan.skipped('prefill'))}"
    return {"name": name, **plan.to_json()}


def _seconds(times: Times) -> dict[str, list[float]]:
    return {"prefill_seconds": times.prefill, "decode_seconds": times.decode}


def summary(result: dict[str, Any]) -> str:
    return "\n".join(
        f"{p['policy']} ({p['compensation']}), "
        f"{p['skipped']} skipped: perplexity {p['perplexity_ratio']:.3f}x, KL {p['kl']:.3f}, "
        f"prefill {p['speedup']['prefill']:.2f}x, decode {p['speedup']['decode']:.2f}x"
        for p in result["points"]
    )
