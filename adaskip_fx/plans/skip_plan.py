"""Skip plans: which sublayers a model leaves out, per phase, and what stands in for them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from adaskip_fx.plans.sublayer import Kind, Sublayer
from adaskip_fx.plans.surrogates import NONE, Surrogates
from adaskip_fx.utils.files import (
    JSON,
    canonical_digest,
    check_digest,
    read_document,
    write_atomically,
)
from adaskip_passes.errors import AdaskipError

__all__ = ["Action", "Kind", "Phase", "PlanError", "SkipPlan", "Sublayer"]

Phase = Literal["prefill", "decode"]
SCHEMA = 2
_KEYS = ("digest", "sublayers", "prefill", "decode", "compensation", "tensors")
_TENSOR_FILE = re.compile(r"compensation-[0-9a-f]{16}\.safetensors")
TIMES = "\N{MULTIPLICATION SIGN}"
_DOT = "\N{MIDDLE DOT}"


class Action(StrEnum):
    """What happens to a sublayer in a phase."""

    RUN = "run"
    SKIP = "skip"
    KV_ONLY = "kv_only"  # K/V (or a mixer's state) is written; the stream is as if it were skipped


class PlanError(AdaskipError, ValueError):
    """A plan that would give wrong answers, or a plan file that cannot be trusted."""


@dataclass(frozen=True)
class SkipPlan:
    """Which sublayers are left out in prefill and in decode. Immutable, hashable, equal by value.

    sublayers: every sublayer of the model, in stream order.
    prefill, decode: the sublayers that do not simply run (entries `RUN` are dropped).
    surrogates: what stands in for the skipped ones.
    last_token_full: whether the last token of a prompt runs as `decode` says instead, as a step of
        its own (POP, arXiv 2602.03295): the first new token then comes from the decode plan. Of a
        prompt that is handed over in chunks it is the last token of each.

    PlanError, naming the sublayer: unknown or listed twice; K/V that would be missing or would
    have holes (attention and mixers are skipped in both phases or in none); `KV_ONLY` for an ffn;
    a surrogate for an unknown sublayer; a phase in which nothing runs.
    """

    sublayers: tuple[Sublayer, ...]
    prefill: Mapping[Sublayer, Action]
    decode: Mapping[Sublayer, Action]
    surrogates: Surrogates = NONE
    last_token_full: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        _check_unique(self.sublayers)
        _check_known(self.sublayers, self.surrogates.by_sublayer, "surrogates")
        for phase in get_args(Phase):
            given: Mapping[Sublayer, Action] = getattr(self, phase)
            _check_known(self.sublayers, given, phase)
            frozen = {s: _action(s, given[s]) for s in self.sublayers if s in given}
            kept = {s: action for s, action in frozen.items() if action is not Action.RUN}
            object.__setattr__(self, phase, MappingProxyType(kept))
            _check_phase(self.sublayers, phase, kept)
        _check_cache(self)

    @classmethod
    def empty(cls, sublayers: Iterable[Sublayer]) -> SkipPlan:
        """The plan of the unchanged model: every sublayer runs."""
        return cls(tuple(sublayers), {}, {})

    @classmethod
    def of(
        cls,
        sublayers: Iterable[Sublayer],
        skip: Iterable[Sublayer | str],
        *,
        decode_extra: Iterable[Sublayer | str] = (),
        surrogates: Surrogates = NONE,
    ) -> SkipPlan:
        """Skip `skip` in both phases and `decode_extra` (ffn only) in decode as well.

        Sublayers may be written as text (`"3.ffn"`); order and repetition do not matter.
        """
        prefill = {_as_sublayer(item): Action.SKIP for item in skip}
        extra = {_as_sublayer(item): Action.SKIP for item in decode_extra}
        return cls(tuple(sublayers), prefill, {**prefill, **extra}, surrogates)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        maps = dict(self.prefill), dict(self.decode)
        return SkipPlan, (self.sublayers, *maps, self.surrogates, self.last_token_full)

    def action(self, phase: Phase, sublayer: Sublayer) -> Action:
        """What `sublayer` does in `phase`; PlanError when the model has no such sublayer."""
        if sublayer not in self._known:
            _check_known(self.sublayers, (sublayer,), phase)
        return self._actions(phase).get(sublayer, Action.RUN)

    def skipped(self, phase: Phase) -> tuple[Sublayer, ...]:
        """The sublayers with action `SKIP` in `phase`, in stream order."""
        # The maps were built in stream order.
        return tuple(s for s, action in self._actions(phase).items() if action is Action.SKIP)

    def with_decode_extra(
        self, extra: Iterable[Sublayer], factors: Mapping[Sublayer, float] | None = None
    ) -> SkipPlan:
        """A plan that also skips `extra` in decode; prefill, and its digest, stay as they are.

        factors: scales for sublayers of `extra`, in place of those the plan has for them.
        PlanError for a factor of another sublayer, or of one that prefill skips as well.
        """
        extra, factors = tuple(extra), factors or {}
        for sublayer in factors:
            if sublayer not in extra or sublayer in self.prefill:
                raise PlanError(f"{sublayer}: a factor was given, but it is no extra of decode")
        decode = {**self.decode, **dict.fromkeys(extra, Action.SKIP)}
        surrogates = self.surrogates.with_factors(factors)
        return replace(self, decode=decode, surrogates=surrogates)

    def with_surrogates(self, surrogates: Surrogates) -> SkipPlan:
        """The same sublayers skipped, with other surrogates."""
        return replace(self, surrogates=surrogates)

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the whole plan, whatever order it was written in."""
        return canonical_digest(
            {**self._phases_json(), "compensation": self.surrogates.digest}  # not its text
        )

    def phase_digest(self, phase: Phase) -> str:
        """16 hex characters that identify what a compiled program of `phase` depends on.

        That is: the phase, every sublayer's action in it, and what stands in for those that do not
        run in it.
        """
        self._actions(phase)
        return self._phase_digests[phase]

    def to_json(self) -> dict[str, JSON]:
        """The content of a plan file; `tensors` names the file beside it, if there is one."""
        head: dict[str, JSON] = {"schema": SCHEMA, "digest": self.digest}
        tensors = self._tensors
        return {
            **head,
            **self._phases_json(),
            "compensation": self.surrogates.to_json(),
            "tensors": f"compensation-{tensors.digest}.safetensors" if tensors else None,
        }

    def save(self, path: str | Path) -> None:
        """Write the plan to the file `path` (JSON); the old file stays until the new is whole.

        Surrogates that are more than one number are written to a file of their own beside it, whose
        name says what is in it (`compensation-DIGEST.safetensors`).
        """
        path, data = Path(path), self.to_json()
        if data["tensors"] is not None:
            self._tensors.save(path.parent / str(data["tensors"]))
        write_atomically(path, json.dumps(data, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> SkipPlan:
        """Read a saved plan; PlanError says which file, what is wrong and what to do."""
        path, redo = Path(path), "build the plan again and save it"
        data = read_document(path, SCHEMA, _KEYS, PlanError, redo)
        try:
            plan = cls(
                tuple(map(Sublayer.parse, data["sublayers"])),
                {Sublayer.parse(name): action for name, action in data["prefill"].items()},
                {Sublayer.parse(name): action for name, action in data["decode"].items()},
                Surrogates.from_json(data["compensation"], _load_tensors(path, data["tensors"])),
                data.get("last_token_full", False) is True,
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise PlanError(f"{path}: not a valid plan ({error}); {redo}") from error
        check_digest(path, data["digest"], plan.digest, PlanError, redo)
        return plan

    def __str__(self) -> str:
        """A heading and one row per layer, plain text."""
        return f"{_heading(self)}\n{layer_table(self.sublayers, lambda s: _cell(self, s))}"

    @property
    def _tensors(self) -> Surrogates:
        """The surrogates that JSON does not hold."""
        return Surrogates(
            {s: c for s, c in self.surrogates.by_sublayer.items() if c.factor is None}
        )

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

    def _phases_json(self) -> dict[str, JSON]:
        return {
            "sublayers": [str(s) for s in self.sublayers],
            "prefill": {str(s): action.value for s, action in self.prefill.items()},
            "decode": {str(s): action.value for s, action in self.decode.items()},
            # Left out where it is off: what plans were called before there was such a thing.
            **({"last_token_full": True} if self.last_token_full else {}),
        }


def _phase_digest(plan: SkipPlan, phase: Phase) -> str:
    actions: list[JSON] = [[str(s), plan.action(phase, s).value] for s in plan.sublayers]
    found = {str(s): plan.surrogates.get(s) for s in plan._actions(phase)}
    surrogates = {name: c.digest for name, c in found.items() if c is not None}
    return canonical_digest({"phase": phase, "actions": actions, "stand_ins": surrogates})


def _load_tensors(path: Path, name: object) -> Surrogates | None:
    """The file beside a plan's that it names, if it names one."""
    if name is None:
        return None
    if not isinstance(name, str) or not _TENSOR_FILE.fullmatch(name):  # never outside the folder
        raise ValueError(f"{name!r} is not the name of a file of surrogates")
    if not (path.parent / name).is_file():
        raise ValueError(f"{path.parent / name} is missing: copy it along with the plan")
    return Surrogates.load(path.parent / name)


def _as_sublayer(item: Sublayer | str) -> Sublayer:
    if isinstance(item, Sublayer):
        return item
    try:
        return Sublayer.parse(item)
    except ValueError as error:
        raise PlanError(str(error)) from error


# Validation ------------------------------------------------------------------------------------


def _action(sublayer: Sublayer, action: object) -> Action:
    try:
        return Action(action)  # type: ignore[arg-type]  # text from a file too; the rest is caught
    except ValueError as error:
        known = ", ".join(Action)
        raise PlanError(f"{sublayer}: unknown action {action!r}, use one of {known}") from error


def _check_unique(sublayers: tuple[Sublayer, ...]) -> None:
    if not sublayers:
        raise PlanError("a plan needs the model's sublayers, got none")
    twice = [str(s) for s, count in Counter(sublayers).items() if count > 1]
    if twice:
        raise PlanError(f"{twice[0]}: listed more than once among the model's sublayers")


def _check_known(sublayers: tuple[Sublayer, ...], named: Iterable[Sublayer], where: str) -> None:
    known = set(sublayers)
    unknown = [str(s) for s in named if s not in known]
    if unknown:
        raise PlanError(
            f"{unknown[0]}: unknown sublayer ({where}); the model has {len(sublayers)}, "
            f"{sublayers[0]} to {sublayers[-1]}"
        )


def _check_phase(
    sublayers: tuple[Sublayer, ...], phase: Phase, actions: Mapping[Sublayer, Action]
) -> None:
    for sublayer, action in actions.items():
        if action is Action.KV_ONLY and sublayer.kind == "ffn":
            raise PlanError(f"{sublayer}: kv_only in {phase}, but an ffn has no K/V; skip it")
    if len(actions) == len(sublayers):
        raise PlanError(
            f"nothing runs in {phase}: all {len(sublayers)} sublayers from {sublayers[0]} to "
            f"{sublayers[-1]} are skipped; at least one must run"
        )


def _check_cache(plan: SkipPlan) -> None:
    """Hold the K/V cache whole: what has K/V is skipped for the whole sequence or never."""
    for sublayer in plan.sublayers:
        prefill, decode = plan.action("prefill", sublayer), plan.action("decode", sublayer)
        if sublayer.kind == "ffn" or (prefill is Action.SKIP) == (decode is Action.SKIP):
            continue
        if prefill is Action.SKIP:
            why = "it has no K/V of the prompt, so skip it in decode too"
        else:
            why = "its K/V would have holes; use kv_only, or skip it in prefill too"
        raise PlanError(f"{sublayer}: {prefill} in prefill but {decode} in decode: {why}")


# Text ------------------------------------------------------------------------------------------


def _heading(plan: SkipPlan) -> str:
    skipped = plan.skipped("prefill")
    counts = Counter(s.kind for s in skipped)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in get_args(Kind) if counts[kind])
    total = len(plan.sublayers)
    return (
        f"SkipPlan {plan.digest[:8]}: prefill skips {len(skipped)} of {total} sublayers"
        f"{f' ({kinds})' if kinds else ''}, decode {len(plan.skipped('decode'))} of {total}"
        f"{'; the last token of a prompt runs as in decode' if plan.last_token_full else ''}"
    )


def _cell(plan: SkipPlan, sublayer: Sublayer) -> str:
    def text(action: Action) -> str:
        if action is Action.RUN:
            return _DOT
        words, surrogate = action.value.replace("_", " "), plan.surrogates.get(sublayer)
        return words if surrogate is None else f"{words} {surrogate}"

    prefill, decode = plan.action("prefill", sublayer), plan.action("decode", sublayer)
    if prefill is decode:
        return text(prefill)
    return f"prefill {text(prefill)}, decode {text(decode)}"


def layer_table(
    sublayers: Sequence[Sublayer], cell: Callable[[Sublayer], str], unit: str = ""
) -> str:
    """One row per layer and one column per kind of sublayer, `unit` after each kind's name."""
    kinds = [kind for kind in get_args(Kind) if any(s.kind == kind for s in sublayers)]
    cells = {(s.layer, s.kind): cell(s) for s in sublayers}
    layers = dict.fromkeys(s.layer for s in sublayers)
    rows = [["layer", *(f"{kind}{unit}" for kind in kinds)]]
    rows += [[str(n), *(cells.get((n, kind), "") for kind in kinds)] for n in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " | ".join([row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:])]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
