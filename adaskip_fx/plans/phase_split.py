"""Plans whose phases differ: skip only while decoding, or only in prompts; and one half of any.

Either way the cache stays whole: attention and mixers that a phase leaves out still write their K/V
or state (`kv_only`), while the stream is as if they were skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from adaskip_fx.plans.order import check_same_sublayers
from adaskip_fx.plans.skip_plan import Action, PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Windows


def decode_only(plan: SkipPlan) -> SkipPlan:
    """Return `plan` with prompts in full; decoding leaves out what it does in `plan`.

    K/V then takes as many bytes as the full model's.
    """
    return replace(
        plan,
        prefill={},
        decode=_keeping_cache(plan.decode),
        last_token_full=False,
        windows=Windows(decode=plan.windows.decode),
    )


def prefill_only(
    plan: SkipPlan, decode: SkipPlan | None = None, *, last_token_full: bool = True
) -> SkipPlan:
    """Return `plan` with decoding in full (POP, arXiv 2602.03295), or with a smaller decode plan.

    Args:
        plan: what prompts leave out; its surrogates hold in both phases.
        decode: what decoding leaves out, if it is not to run in full; a subset of what `plan` does.
        last_token_full: whether a prompt's last token runs as in decode already, so that the first
            new token is the full model's (the paper's boundary handling).

    Raises:
        PlanError: `decode` is of another model, or leaves out what `plan` does not.
    """
    smaller = decode if decode is not None else SkipPlan.empty(plan.sublayers)
    _check_smaller(plan, smaller)
    return replace(
        plan,
        prefill=_keeping_cache(plan.prefill),
        decode=_keeping_cache(smaller.decode),
        last_token_full=last_token_full,
        windows=Windows(plan.windows.prefill, smaller.windows.decode),
    )


@functools.lru_cache(maxsize=64)
@functools.lru_cache(maxsize=64)  # steps compare plans by identity
def as_decode(plan: SkipPlan) -> SkipPlan:
    """Return a plan whose prompts run as decode steps of `plan` do.

    A graph of several tokens runs with it where these are decoded ones: drafts to be verified.
    """
    if plan.phases_alike and not plan.last_token_full:
        return plan
    windows = Windows(plan.windows.decode, plan.windows.decode)
    return replace(plan, prefill=plan.decode, last_token_full=False, windows=windows)


def _keeping_cache(actions: Mapping[Sublayer, Action]) -> dict[Sublayer, Action]:
    return {s: Action.SKIP if s.kind == "ffn" else Action.KV_ONLY for s in actions}


def _check_smaller(plan: SkipPlan, smaller: SkipPlan) -> None:
    check_same_sublayers(plan, smaller)
    more = [str(s) for s in smaller.decode if s not in plan.prefill]
    if more:
        raise PlanError(
            f"{more[0]}: left out of decode but not of prompts; the plan for decode must skip a "
            "subset of what the other skips, whose surrogates it uses"
        )
