"""The part of a plan that an engine can run: one set of sublayers for prompts and decode.

An engine mixes prompts of some requests with decode steps of others in one batch, and one program
runs them all. So a plan is served only if every sublayer does the same in both phases.
"""

from __future__ import annotations

from dataclasses import replace

from adaskip_fx.plans.actions import Action, Phase, PlanError
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows


def static_plan(plan: SkipPlan, phase: Phase | None = None) -> SkipPlan:
    """Return `plan` as one that does the same in both phases.

    A sublayer that is `kv_only` in both phases is skipped: nobody reads the K/V it would write.

    Args:
        plan: Any plan.
        phase: The phase whose actions hold in both, for a plan whose phases differ.

    Raises:
        PlanError: The phases differ, and none was chosen; names the first sublayer that differs.
    """
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    if phase is None:
        _check_alike(plan)
        phase = "prefill"
    elif phase not in phases:
        raise ValueError(f"unknown phase {phase!r}: use 'prefill' or 'decode'")
    left_out = plan.prefill if phase == "prefill" else plan.decode
    skipped = dict.fromkeys(left_out, Action.SKIP)
    windows = Windows.of(dict(plan.windows.of_phase(phase)))
    kept = {s: c for s, c in plan.surrogates.by_sublayer.items() if s in skipped}
    return replace(
        plan,
        prefill=skipped,
        decode=skipped,
        surrogates=replace(plan.surrogates, by_sublayer=kept),
        last_token_full=False,
        windows=windows,
    )


def _check_alike(plan: SkipPlan) -> None:
    for sublayer in plan.sublayers:
        phases: tuple[Phase, Phase] = ("prefill", "decode")
        runs = [plan.action(p, sublayer) is Action.RUN for p in phases]
        seen = [plan.window(p, sublayer) for p in phases]
        if runs[0] == runs[1] and seen[0] == seen[1]:
            continue
        said = [_described(plan.action(p, sublayer), w) for p, w in zip(phases, seen, strict=True)]
        raise PlanError(
            f"{sublayer}: {said[0]} in prefill but {said[1]} in decode; an engine runs prompts and "
            "decode steps in one batch, so a plan must be the same in both: choose the part that "
            "is served with --phase prefill or --phase decode"
        )


def _described(action: Action, window: Window | None) -> str:
    return str(window) if window is not None else str(action)
