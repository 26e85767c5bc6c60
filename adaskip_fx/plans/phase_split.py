"""Plans whose phases differ: skip only while decoding, or only in prompts.

Either way the cache stays whole: attention and mixers that a phase leaves out still write their K/V
or state (`kv_only`); to the stream they are as if they were skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer


def decode_only(plan: SkipPlan) -> SkipPlan:
    """Run prompts in full, and leave out while decoding what `plan` leaves out there.

    K/V then takes as many bytes as the full model's.
    """
    return replace(plan, prefill={}, decode=_written(plan.decode), last_token_full=False)


def prefill_only(
    plan: SkipPlan, decode: SkipPlan | None = None, *, last_token_full: bool = True
) -> SkipPlan:
    """Leave out of prompts what `plan` leaves out there, and decode in full (POP, 2602.03295).

    Args:
        plan: what prompts leave out; its surrogates stand in, in both phases.
        decode: what decoding leaves out, if it is not to run in full: a part of what `plan` does.
        last_token_full: whether a prompt's last token runs as in decode already, so that the first
            new token is the full model's (the paper's boundary handling).

    Raises:
        PlanError: `decode` is of another model, or leaves out what `plan` does not.
    """
    smaller = decode if decode is not None else SkipPlan.empty(plan.sublayers)
    _check_smaller(plan, smaller)
    return replace(
        plan,
        prefill=_written(plan.prefill),
        decode=_written(smaller.decode),
        last_token_full=last_token_full,
    )


def _written(actions: Mapping[Sublayer, Action]) -> dict[Sublayer, Action]:
    return {s: Action.SKIP if s.kind == "ffn" else Action.KV_ONLY for s in actions}


def _check_smaller(plan: SkipPlan, smaller: SkipPlan) -> None:
    if smaller.sublayers != plan.sublayers:
        raise PlanError("the two plans are for different models: their sublayers differ")
    more = [str(s) for s in smaller.decode if s not in plan.prefill]
    if more:
        raise PlanError(
            f"{more[0]}: left out of decode but not of prompts; the plan for decode is to be a "
            "part of the other, whose surrogates stand in"
        )
