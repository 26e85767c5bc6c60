"""Checks of a plan: each raises a `PlanError` that names the sublayer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from adaskip_fx.plans.actions import Action, Phase, PlanError
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.windows import Window

Actions = Mapping[Sublayer, Action]


def parse_sublayer(item: Sublayer | str) -> Sublayer:
    """Return a sublayer that may be written as text (`"3.ffn"`)."""
    if isinstance(item, Sublayer):
        return item
    try:
        return Sublayer.parse(item)
    except ValueError as error:
        raise PlanError(str(error)) from error


def parse_action(sublayer: Sublayer, action: str) -> Action:
    """Return the action of `sublayer`, which may be text from a file."""
    try:
        return Action(action)
    except ValueError as error:
        known = ", ".join(Action)
        raise PlanError(f"{sublayer}: unknown action {action!r}, use one of {known}") from error


def check_unique(sublayers: tuple[Sublayer, ...]) -> None:
    """Refuse a model without sublayers, or one that lists a sublayer twice."""
    if not sublayers:
        raise PlanError("a plan needs the model's sublayers, got none")
    twice = [str(s) for s, count in Counter(sublayers).items() if count > 1]
    if twice:
        raise PlanError(f"{twice[0]}: listed more than once among the model's sublayers")


def check_known(sublayers: tuple[Sublayer, ...], named: Iterable[Sublayer], where: str) -> None:
    """Refuse sublayers that the model does not have; `where` they were named is in the message."""
    known = set(sublayers)
    unknown = [str(s) for s in named if s not in known]
    if unknown:
        raise PlanError(
            f"{unknown[0]}: unknown sublayer ({where}); the model has {len(sublayers)}, "
            f"{sublayers[0]} to {sublayers[-1]}"
        )


def check_phase(sublayers: tuple[Sublayer, ...], phase: Phase, actions: Actions) -> None:
    """Refuse an ffn that writes K/V, and a phase in which nothing runs."""
    for sublayer, action in actions.items():
        if action is Action.KV_ONLY and sublayer.kind == "ffn":
            raise PlanError(f"{sublayer}: kv_only in {phase}, but an ffn has no K/V; skip it")
    if len(actions) == len(sublayers):
        raise PlanError(
            f"nothing runs in {phase}: all {len(sublayers)} sublayers from {sublayers[0]} to "
            f"{sublayers[-1]} are skipped; at least one must run"
        )


def check_windows(
    sublayers: tuple[Sublayer, ...],
    windows: Mapping[Sublayer, Window],
    phase: Phase,
    actions: Actions,
) -> None:
    """Refuse windows of unknown sublayers, of others than attention, and where it does not run."""
    check_known(sublayers, windows, f"windows in {phase}")
    for sublayer in windows:
        if sublayer.kind != "attention":
            raise PlanError(f"{sublayer}: a window in {phase}, but only attention has one")
        if sublayer in actions:
            raise PlanError(
                f"{sublayer}: a window in {phase}, where its action is {actions[sublayer]}; only "
                "attention that runs has one"
            )


def check_cache(sublayers: tuple[Sublayer, ...], prefill: Actions, decode: Actions) -> None:
    """Refuse a cache with holes: K/V is written for the whole sequence or for none of it."""
    for sublayer in sublayers:
        before, after = (actions.get(sublayer, Action.RUN) for actions in (prefill, decode))
        if sublayer.kind == "ffn" or (before is Action.SKIP) == (after is Action.SKIP):
            continue
        if before is Action.SKIP:
            why = "it has no K/V of the prompt, so skip it in decode too"
        else:
            why = "its K/V would have holes; use kv_only, or skip it in prefill too"
        raise PlanError(f"{sublayer}: {before} in prefill but {after} in decode: {why}")
