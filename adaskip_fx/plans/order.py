"""The order of plans by what they leave out, and the union of two plans.

What is left out is compared in prompts, in the last token of a prompt (`last_token_full` has it run
as in decode) and in decode. There a sublayer runs and sees everything, runs and sees a window, is
`kv_only` or is skipped; each of these leaves out more than the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from adaskip_fx.plans.actions import Action, PlanError
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan

Reduction: TypeAlias = Action | Window
Reductions: TypeAlias = Mapping[Sublayer, Reduction]  #: one that is missing runs and sees all


def is_below(lower: SkipPlan, upper: SkipPlan) -> bool:
    """Return whether `upper` leaves out at least what `lower` does (`lower <= upper`).

    What `lower` leaves out has the same surrogate in both. A surrogate of a sublayer that runs in
    both is in `upper` too; one that `upper` alone leaves out may have any.

    Raises:
        PlanError: The plans are for different models.
    """
    check_same_sublayers(lower, upper)
    places = zip(_places(lower), _places(upper), strict=True)
    return (
        all(_within(less, more) for less, more in places)
        and all(_agrees(lower, upper, s) for s in lower.sublayers)
        and not _is_with_last_token_full(lower, upper)
    )


def union(first: SkipPlan, second: SkipPlan) -> SkipPlan:
    """Return the least plan that leaves out what either does (`first | second`).

    Attention and mixers stay skipped in both phases or in none: nothing is above skipped in both,
    and what else two valid plans do to them is joined to run or `kv_only`.

    Raises:
        PlanError: There is none: the plans are for different models; a sublayer that both leave
            out, or that neither does, has two surrogates; only one plan has `last_token_full`, and
            the last token of a prompt would be like neither phase of the union; or nothing would
            run in a phase.
    """
    if is_below(first, second):
        return second
    if is_below(second, first):
        return first
    prefill, decode, last = map(_joined, _places(first), _places(second))
    surrogates = {s: _surrogate(first, second, s) for s in first.sublayers}
    return replace(
        first,
        prefill=_actions(prefill),
        decode=_actions(decode),
        surrogates=Surrogates({s: c for s, c in surrogates.items() if c is not None}),
        last_token_full=_last_token_full(prefill, decode, last),
        windows=Windows(_windows(prefill), _windows(decode)),
    )


def check_same_sublayers(first: SkipPlan, second: SkipPlan) -> None:
    """Refuse two plans for different models."""
    if first.sublayers != second.sublayers:
        raise PlanError("the two plans are for different models: their sublayers differ")


# Phases ----------------------------------------------------------------------------------------


def _places(plan: SkipPlan) -> tuple[Reductions, Reductions, Reductions]:
    """Return what is left out in prompts, in decode, and in the last token of a prompt."""
    prefill: Reductions = {**plan.windows.prefill, **plan.prefill}
    decode: Reductions = {**plan.windows.decode, **plan.decode}
    return prefill, decode, decode if plan.last_token_full else prefill


def _within(less: Reductions, more: Reductions) -> bool:
    return all(s in more and _reaches(more[s], reduction) for s, reduction in less.items())


def _joined(first: Reductions, second: Reductions) -> Reductions:
    both = {s: _join(first[s], second[s]) for s in first if s in second}
    return {**first, **second, **both}


def _reaches(more: Reduction, less: Reduction) -> bool:
    if isinstance(more, Window) and isinstance(less, Window):
        return more.sees_within(less)
    return _rank(more) >= _rank(less)


def _join(first: Reduction, second: Reduction) -> Reduction:
    if isinstance(first, Window) and isinstance(second, Window):
        return first.joined(second)
    return max(first, second, key=_rank)


def _rank(reduction: Reduction) -> int:
    if isinstance(reduction, Window):
        return 0
    return (Action.KV_ONLY, Action.SKIP).index(reduction) + 1


def _actions(reductions: Reductions) -> dict[Sublayer, Action]:
    return {s: r for s, r in reductions.items() if isinstance(r, Action)}


def _windows(reductions: Reductions) -> dict[Sublayer, Window]:
    return {s: r for s, r in reductions.items() if isinstance(r, Window)}


# Surrogates ------------------------------------------------------------------------------------


def _leaves_out(plan: SkipPlan, sublayer: Sublayer) -> bool:
    return sublayer in plan.prefill or sublayer in plan.decode


def _agrees(lower: SkipPlan, upper: SkipPlan, sublayer: Sublayer) -> bool:
    mine, theirs = lower.surrogates.get(sublayer), upper.surrogates.get(sublayer)
    if mine == theirs:
        return True
    return not _leaves_out(lower, sublayer) and (mine is None or _leaves_out(upper, sublayer))


def _surrogate(first: SkipPlan, second: SkipPlan, sublayer: Sublayer) -> Surrogate | None:
    """Return that of the plan that leaves the sublayer out."""
    mine, theirs = first.surrogates.get(sublayer), second.surrogates.get(sublayer)
    if _leaves_out(first, sublayer) != _leaves_out(second, sublayer):
        return mine if _leaves_out(first, sublayer) else theirs
    if not _leaves_out(first, sublayer) and (mine is None or theirs is None):
        return theirs if mine is None else mine
    if mine != theirs:
        raise PlanError(
            f"{sublayer}: the two plans have different surrogates for it, {mine or 'none'} and "
            f"{theirs or 'none'}; give both the same one (with_surrogates)"
        )
    return mine


# The last token of a prompt --------------------------------------------------------------------


def _is_with_last_token_full(plan: SkipPlan, other: SkipPlan) -> bool:
    """Return whether `plan` is `other` with `last_token_full`, which changes nothing there.

    Plans that differ in nothing else would be below each other.
    """
    says_nothing = plan.phases_alike and plan.last_token_full
    return says_nothing and replace(plan, last_token_full=False) == other


def _last_token_full(prefill: Reductions, decode: Reductions, last: Reductions) -> bool:
    """Return what the union has; False where its phases are alike.

    Every plan above both leaves out at least `last` in the last token. So the least is one of two:
    with `last` in prefill too, or with `last_token_full` and with `last` in decode too.
    """
    if _within(last, prefill) and _within(prefill, _joined(decode, last)):
        return False
    if _within(last, decode) and _within(decode, _joined(prefill, last)):
        return True
    raise PlanError(
        "only one of the two plans has last_token_full, and the last token of a prompt would be "
        "like neither prefill nor decode of their union; set it in both or in none"
    )
