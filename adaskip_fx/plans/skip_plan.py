"""Skip plans: which sublayers a model leaves out, per phase, and their surrogates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from adaskip_fx.plans import order, plan_file, validation
from adaskip_fx.plans.actions import Action, Phase, PlanError
from adaskip_fx.plans.fingerprint import Fingerprint
from adaskip_fx.plans.sublayer import Kind, Sublayer
from adaskip_fx.plans.surrogates import NO_SURROGATES, Surrogates
from adaskip_fx.plans.tables import plan_table
from adaskip_fx.plans.windows import NO_WINDOWS, Window, Windows
from adaskip_fx.utils.files import JSON, canonical_digest

__all__ = ["Action", "Kind", "Phase", "PlanError", "SkipPlan", "Sublayer"]


@dataclass(frozen=True)
class SkipPlan:
    """Which sublayers are left out in prefill and in decode. Immutable, hashable, equal by value.

    Plans of one model are ordered by what they leave out. ``a <= b`` says that b leaves out at
    least what a does: in prompts, in their last token and in decode each sublayer is as reduced or
    more (run, run with a window, kv_only, skip), a window of b sees nothing that a's does not, and
    what a leaves out has the same surrogate in b. Often neither of two plans is below the other.
    ``a | b`` is the least plan above both.

    Attributes:
        sublayers: every sublayer of the model, in stream order.
        prefill: the sublayers that do not simply run in prefill (entries `RUN` are dropped).
        decode: likewise in decode.
        surrogates: what the skipped sublayers become.
        last_token_full: whether the last token of a prompt runs as `decode` says instead, as a step
            of its own (POP, arXiv 2602.03295): the first new token then comes from the decode plan.
            Of a prompt that arrives in chunks it is the last token of each.
        windows: what the attention that runs sees, where it is less than everything.
        fingerprint: which model it is for, where that is known; of another one it is refused. It
            takes no part in what is equal.

    Raises:
        PlanError: names the sublayer. It is unknown or listed twice; its K/V would be missing or
            would have holes (attention and mixers are skipped in both phases or in none); it is an
            ffn with `KV_ONLY`; there is a surrogate or a window for an unknown sublayer; a window
            is of something else than attention that runs; or nothing runs in a phase.
    """

    sublayers: tuple[Sublayer, ...]
    prefill: Mapping[Sublayer, Action]
    decode: Mapping[Sublayer, Action]
    surrogates: Surrogates = NO_SURROGATES
    last_token_full: bool = False
    windows: Windows = NO_WINDOWS
    fingerprint: Fingerprint | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        validation.check_unique(self.sublayers)
        validation.check_known(self.sublayers, self.surrogates.by_sublayer, "surrogates")
        for phase in get_args(Phase):
            actions = self._actions(phase)
            validation.check_known(self.sublayers, actions, phase)
            ordered = (s for s in self.sublayers if s in actions)
            parsed = {s: validation.parse_action(s, actions[s]) for s in ordered}
            not_run = {s: action for s, action in parsed.items() if action is not Action.RUN}
            validation.check_phase(self.sublayers, phase, not_run)
            object.__setattr__(self, phase, MappingProxyType(not_run))
            validation.check_windows(self.sublayers, self.windows.of_phase(phase), phase, not_run)
        validation.check_cache(self.sublayers, self.prefill, self.decode)

    @classmethod
    def empty(cls, sublayers: Iterable[Sublayer]) -> SkipPlan:
        """Return the plan of the unchanged model: every sublayer runs."""
        return cls(tuple(sublayers), {}, {})

    @classmethod
    def of(
        cls,
        sublayers: Iterable[Sublayer],
        skip: Iterable[Sublayer | str],
        *,
        decode_extra: Iterable[Sublayer | str] = (),
        surrogates: Surrogates = NO_SURROGATES,
        windows: Windows = NO_WINDOWS,
    ) -> SkipPlan:
        """Return the plan that skips `skip` in both phases and `decode_extra` in decode as well.

        Args:
            sublayers: every sublayer of the model, in stream order.
            skip: sublayers, which may be written as text (`"3.ffn"`); order and repetition do not
                matter.
            decode_extra: likewise; ffn only.
            surrogates: what the skipped sublayers become.
            windows: what attention that runs sees.

        Raises:
            PlanError: as for the constructor.
        """
        prefill = {validation.parse_sublayer(item): Action.SKIP for item in skip}
        extra = {validation.parse_sublayer(item): Action.SKIP for item in decode_extra}
        decode = {**prefill, **extra}
        return cls(tuple(sublayers), prefill, decode, surrogates, windows=windows)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __le__(self, other: SkipPlan) -> bool:
        """Return whether `other` leaves out at least what this plan does.

        Raises:
            PlanError: the plans are for different models.
        """
        return order.is_below(self, other) if isinstance(other, SkipPlan) else NotImplemented

    def __lt__(self, other: SkipPlan) -> bool:
        """Return whether `other` leaves out what this plan does, and is another plan.

        Raises:
            PlanError: the plans are for different models.
        """
        return self <= other and self != other if isinstance(other, SkipPlan) else NotImplemented

    def __or__(self, other: SkipPlan) -> SkipPlan:
        """Return the least plan that leaves out what either does.

        Raises:
            PlanError: there is none. The plans are for different models, or conflict in a surrogate
                or in `last_token_full`, or nothing would run in a phase.
        """
        return order.union(self, other) if isinstance(other, SkipPlan) else NotImplemented

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        maps = dict(self.prefill), dict(self.decode)
        more = self.surrogates, self.last_token_full, self.windows, self.fingerprint
        return SkipPlan, (self.sublayers, *maps, *more)

    def action(self, phase: Phase, sublayer: Sublayer) -> Action:
        """Return what `sublayer` does in `phase`.

        Raises:
            PlanError: the model has no such sublayer.
        """
        if sublayer not in self._known:
            validation.check_known(self.sublayers, (sublayer,), phase)
        return self._actions(phase).get(sublayer, Action.RUN)

    def window(self, phase: Phase, sublayer: Sublayer) -> Window | None:
        """Return what `sublayer` sees in `phase`; None where it sees everything, or does not run.

        Raises:
            PlanError: the model has no such sublayer.
        """
        self.action(phase, sublayer)
        return self.windows.get(phase, sublayer)

    @property
    def phases_alike(self) -> bool:
        """Whether every sublayer does the same in prefill and in decode."""
        return self.prefill == self.decode and self.windows.prefill == self.windows.decode

    def skipped(self, phase: Phase) -> tuple[Sublayer, ...]:
        """Return the sublayers with action `SKIP` in `phase`, in stream order."""
        # The maps were built in stream order.
        return tuple(s for s, action in self._actions(phase).items() if action is Action.SKIP)

    def with_decode_extra(
        self, extra: Iterable[Sublayer], factors: Mapping[Sublayer, float] | None = None
    ) -> SkipPlan:
        """Return a plan that also skips `extra` in decode; prefill and its digest stay the same.

        Args:
            extra: ffn sublayers.
            factors: scales for sublayers of `extra`, in place of the surrogates that the plan has.

        Raises:
            PlanError: a factor of a sublayer that is not in `extra`, or that prefill skips as well.
        """
        extra, factors = tuple(extra), factors or {}
        for sublayer in factors:
            if sublayer not in extra or sublayer in self.prefill:
                raise PlanError(f"{sublayer}: a factor was given, but it is no extra of decode")
        decode = {**self.decode, **dict.fromkeys(extra, Action.SKIP)}
        surrogates = self.surrogates.with_factors(factors)
        return replace(self, decode=decode, surrogates=surrogates)

    def with_surrogates(self, surrogates: Surrogates) -> SkipPlan:
        """Return a plan that skips the same sublayers, with other surrogates."""
        return replace(self, surrogates=surrogates)

    def with_fingerprint(self, fingerprint: Fingerprint | None) -> SkipPlan:
        """Return the same plan for a model, as :func:`adaskip_fx.profiles.fingerprint` takes it."""
        return replace(self, fingerprint=fingerprint)

    def with_windows(self, windows: Windows) -> SkipPlan:
        """Return a plan that skips the same sublayers, whose attention has other windows."""
        return replace(self, windows=windows)

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the whole plan, whatever order it was written in."""
        return canonical_digest(
            {**plan_file.actions_json(self), "compensation": self.surrogates.digest}
        )

    def phase_digest(self, phase: Phase) -> str:
        """Return 16 hex characters that identify what a compiled program of `phase` depends on.

        That is: the phase, every sublayer's action in it, the surrogates of those that do not run
        in it, and the windows of those that do.
        """
        self._actions(phase)
        return self._phase_digests[phase]

    def to_json(self) -> dict[str, JSON]:
        """Return the content of a plan file; `tensors` names the file beside it, if any."""
        return plan_file.document(self)

    def save(self, path: str | Path) -> None:
        """Write the plan to the file `path` (JSON); the old file stays until the new is whole.

        Surrogates that are more than one number are written to a separate file beside it, whose
        name says what is in it (`compensation-DIGEST.safetensors`).
        """
        plan_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SkipPlan:
        """Return a saved plan.

        Raises:
            PlanError: the message says which file, what is wrong and what to do.
        """
        return plan_file.load(cls, Path(path))

    def __str__(self) -> str:
        """Return a heading and one row per layer, plain text."""
        return plan_table(self)

    @cached_property
    def _known(self) -> frozenset[Sublayer]:
        return frozenset(self.sublayers)

    @cached_property
    def _phase_digests(self) -> Mapping[Phase, str]:
        # Cached: a generation loop puts them into its program key.
        return {phase: _phase_digest(self, phase) for phase in get_args(Phase)}

    def _actions(self, phase: Phase) -> Mapping[Sublayer, Action]:
        if phase not in get_args(Phase):
            raise ValueError(f"unknown phase {phase!r}: use 'prefill' or 'decode'")
        return self.prefill if phase == "prefill" else self.decode


def _phase_digest(plan: SkipPlan, phase: Phase) -> str:
    actions: list[JSON] = [[str(s), plan.action(phase, s).value] for s in plan.sublayers]
    not_run = plan.prefill if phase == "prefill" else plan.decode
    found = {str(s): plan.surrogates.get(s) for s in not_run}
    surrogates = {name: c.digest for name, c in found.items() if c is not None}
    windows: dict[str, JSON] = {
        str(s): window.to_json() for s, window in plan.windows.of_phase(phase).items()
    }
    content: dict[str, JSON] = {"phase": phase, "actions": actions, "stand_ins": surrogates}
    return canonical_digest({**content, **({"windows": windows} if windows else {})})
