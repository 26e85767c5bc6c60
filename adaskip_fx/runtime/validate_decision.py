"""Whether a decision can be run by a model, asked before anything of it runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from adaskip_passes import UnsupportedError

from ..plans.decisions import Decision, PlanChooser, Schedule, plans_of
from ..plans.fingerprint import Fingerprint
from ..plans.skip_plan import PlanError, SkipPlan
from ..plans.sublayer import Sublayer
from ..profiles.fingerprint import digests_of, fingerprint
from ..programs.program_cache import Graphs


class Validator:
    """Validates decisions for one model; the last one that was valid is not looked at again."""

    def __init__(self, graphs: Graphs, original: Any) -> None:
        """Validate for a compiled model.

        Args:
            graphs: of it, one at least captured.
            original: the model that it was made of.
        """
        self._graphs, self._original = graphs, original
        self._digests = digests_of(original)
        self._valid: Decision | None = None

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Of the model."""
        return fingerprint(self._original)

    def check(self, decision: Decision) -> None:
        """Refuse a decision that the model cannot run; see `validate_decision`.

        Raises:
            RanksError: the model is on several ranks, and others are given another decision.
        """
        if decision is not self._valid:
            self._graphs.ranks.agree("a plan", getattr(decision, "digest", decision))
            name = type(self._original).__name__
            validate_decision(decision, self._graphs, name, self._digests)
            self._valid = decision


def validate_decision(
    decision: Decision, graphs: Graphs, model: str, digests: frozenset[str]
) -> None:
    """Refuse a decision of another model, or one that skips what cannot be skipped.

    Args:
        decision: any.
        graphs: of the compiled model, one at least captured.
        model: what it is called in messages.
        digests: that its fingerprint may have.

    Raises:
        PlanError: other sublayers, another model's fingerprint, surrogates of another width, or a
            window of a K/V head that there is not.
        UnsupportedError: a skipped sublayer hands on more than the residual stream, or attention
            cannot have the window that it is given.
    """
    if not isinstance(decision, SkipPlan | Schedule | PlanChooser):
        raise TypeError(
            "a plan is a SkipPlan, a Schedule or a subclass of PlanChooser, got "
            f"{type(decision).__name__}"
        )
    if decision.sublayers != graphs.sublayers:
        raise PlanError(
            f"the plan is for {_summary(decision.sublayers)}, but {model} has "
            f"{_summary(graphs.sublayers)}"
        )
    _check_fingerprints(decision, digests, model)
    _check_widths(decision, graphs.structure.width, model)
    _check_skippable(decision, graphs.structure.unskippable, model)
    _check_windows(decision, graphs)


def _check_fingerprints(decision: Decision, digests: frozenset[str], model: str) -> None:
    for plan in plans_of(decision):
        known = plan.fingerprint
        if known is not None and known.digest not in digests:
            raise PlanError(
                f"the plan was made for {known}, but {model} is another one; load the plan of "
                "this model, or make one of its profile"
            )


def _check_widths(decision: Decision, width: int, model: str) -> None:
    for plan in plans_of(decision):
        for sublayer, surrogate in plan.surrogates.by_sublayer.items():
            if surrogate.width not in (None, width):
                raise PlanError(
                    f"{sublayer}: its {surrogate.kind} surrogate is for a stream of width "
                    f"{surrogate.width}, but that of {model} is {width} wide; it was fitted on "
                    "another model"
                )


def _check_skippable(decision: Decision, unskippable: frozenset[Sublayer], model: str) -> None:
    if not unskippable:
        return
    skipped = {s for p in plans_of(decision) for s in (*p.skipped("prefill"), *p.skipped("decode"))}
    refused = [str(s) for s in decision.sublayers if s in skipped & unskippable]
    if refused:
        raise UnsupportedError(
            f"the plan skips {', '.join(refused)}, but what is computed there is read by later "
            f"layers besides the residual stream. Of {model} these cannot be skipped: "
            f"{', '.join(map(str, sorted(unskippable)))}; pass a plan without them"
        )


def _check_windows(decision: Decision, graphs: Graphs) -> None:
    for plan in plans_of(decision):
        windows = (*plan.windows.prefill.items(), *plan.windows.decode.items())
        for sublayer, window in windows:
            attention = graphs.structure.attention.get(sublayer)
            if isinstance(attention, UnsupportedError):
                raise attention
            if attention is None:
                raise UnsupportedError(
                    f"{sublayer}: a window, but the model has no attention there"
                )
            share = graphs.structure.share(sublayer)
            if window.full_heads and share is None:
                graphs.ranks.refuse(
                    f"{sublayer}: a window that leaves K/V heads full",
                    "which rank has which is not known: use a window of the whole layer",
                )
            heads = attention.kv_heads * (1 if share is None else share.parts)
            if window.full_heads and window.full_heads[-1] >= heads:
                raise PlanError(
                    f"{sublayer}: its window leaves K/V head {window.full_heads[-1]} full, but "
                    f"there are {heads}, from 0 on"
                )
            stored = graphs.specs[sublayer.layer].key_heads
            if window.full_heads and 0 < stored < attention.kv_heads:
                raise PlanError(
                    f"{sublayer}: its window leaves K/V heads full, but the keys of its {heads} "
                    "heads are made of one latent, which a step reads for all of them; use a "
                    "window of the whole layer"
                )
            if window.sinks and attention.sees != "everything":
                raise UnsupportedError(
                    f"{sublayer}: its window has sinks, but the model's own mask (a window, say) "
                    "hides tokens there, and a plan never shows it more; use sinks=0"
                )


def _summary(sublayers: Sequence[Sublayer]) -> str:
    kinds = sorted({s.kind for s in sublayers})
    counts = ", ".join(f"{sum(s.kind == k for s in sublayers)} {k}" for k in kinds)
    return f"{len(sublayers)} sublayers ({counts})"
