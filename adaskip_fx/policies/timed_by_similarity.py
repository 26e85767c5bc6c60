"""Skip, or give windows, where a second that is saved changes the stream least: by a profile alone.

AdaSkip's measure of what is skipped, and the same of what sees a window, over predicted time. What
the paper's ratio counts in sublayers is counted in time at a context here, so that the cheap
seconds of long contexts, those of windows, are found where there are some.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from adaskip_fx.latency.multiple_choice import choose_options
from adaskip_fx.latency.terms import Weights, goals_of, named, window_term, window_terms
from adaskip_fx.plans.skip_plan import Phase, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.policies.stream_change import StreamChange, measured_as
from adaskip_fx.profiles.validation import ProfileError

if TYPE_CHECKING:
    from adaskip_fx.latency.table import LatencyTable
    from adaskip_fx.profiles.profile import Profile

PHASES: tuple[Phase, ...] = get_args(Phase)
_SCALE = "scale"  # the cost term of what stands in for a skipped sublayer


@dataclass(frozen=True)
class TimedBySimilarity:
    """Choose what is skipped and what gets a window by change of the stream for a second saved.

    What a sublayer changes where it is skipped, and each of its K/V heads where it sees a window,
    is added up, as are the times of a table. Nothing is run and nothing trained; `TimedGreedy`
    judges by a loss, which knows more. Windows are those that both the profile
    (``calibrate(..., windows=[...])``) and the table know; without any, only skipping is chosen.
    It is what ``adaskip_fx.compile(..., context=...)`` uses.

    Attributes:
        table: Predicts the time of plans.
        context: Tokens of a prompt, and tokens stored at a step, for which it predicts.
        phase: What is to be faster: each of `"both"` phases, one of them, or how often each counts.

    Raises:
        ValueError: An unknown phase.
    """

    table: LatencyTable
    context: int
    phase: Weights | Literal["both"] = "both"

    def __post_init__(self) -> None:
        goals_of(self.phase)

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that the table was not measured on.

        Raises:
            TableError: The message says what differs and what to do.
        """
        self.table.check(model)

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return a plan that is predicted to be `alpha` times as fast.

        A skipped sublayer becomes AdaSkip's scale of the stream (arXiv 2501.02336, eq. 4). Phases
        are chosen apart as far as one request can have both: an FFN may be skipped in decode alone,
        and a window may be in either phase; what prompts skip stores nothing, so it is skipped in
        both. What is in one phase alone counts half of what it changes.

        Raises:
            ValueError: `alpha` is below 1, or cannot be reached: the message says how far plans go.
            TableError: The table is of another model, or of other contexts.
        """
        if not 1.0 <= alpha < math.inf:
            raise ValueError(f"alpha, the speed-up, must be at least 1, got {alpha!r}")
        change, full = StreamChange(profile, self.windows(profile)), self._full()
        options = [list(self._options(s, change)) for s in profile.sublayers]
        chosen, saved = choose_options(
            [[option.lost for option in found] for found in options],
            [[self._saved(option, full) for option in found] for found in options],
            [1 - 1 / alpha] * len(goals_of(self.phase)),
        )
        if (saved < (1 - 1 / alpha) * (1 - 1e-9)).any():
            raise ValueError(self._out_of_reach(profile, alpha, saved))
        taken = [found[n] for found, n in zip(options, chosen, strict=True) if n >= 0]
        factors = profile.scales().factors
        skip = {o.sublayer: o.phases for o in taken if o.window is None}
        narrow = {
            phase: {o.sublayer: o.window for o in taken if o.window and phase in o.phases}
            for phase in PHASES
        }
        return SkipPlan.of(
            profile.sublayers,
            [s for s, phases in skip.items() if phases == PHASES],
            decode_extra=[s for s, phases in skip.items() if phases != PHASES],
            surrogates=Surrogates.scale({s: f for s, f in factors.items() if s in skip}),
            windows=Windows(**narrow),
        )

    def windows(self, profile: Profile) -> tuple[Window, ...]:
        """Return the windows that a profile and the table both know.

        Raises:
            TableError: The table is of other contexts.
        """
        if profile.windows is None or not self.table.kv_heads:
            return ()
        names = {self._class(s) for s in profile.windows.kv_heads} - {""}
        costs = [self.table.at(phase, self.context) for phase in PHASES]
        return tuple(
            window
            for window in profile.windows.windows
            if names and all(window_term(n, window) in c for n in names for c in costs)
        )

    def describe(self, plan: SkipPlan, profile: Profile | None = None) -> str:
        """Return what a plan is predicted to gain, what it does, and what that changes, in lines.

        Args:
            plan: Any plan of the model.
            profile: By which plans are judged.

        Raises:
            TableError: The table does not know what the plan does.
        """
        speed_ups = self.table.speed_ups(plan, "both", self.context)
        told = ", ".join(f"{phase} {speed_up:.3g}x" for phase, speed_up in speed_ups.items())
        how = self.table.conditions.get("times", "measured")
        lines = [f"predicted at {self.context:,} tokens: {told} ({how})", self._chosen(plan)]
        if profile is not None:
            lines += [_changed(plan, profile), self._no_windows(profile)]
        return "\n".join(filter(None, lines))

    def _class(self, sublayer: Sublayer) -> str:
        return self.table.classes[self.table.sublayers.index(sublayer)]

    def _full(self) -> dict[Phase, float]:
        """Return the seconds of the full model."""
        empty = SkipPlan.empty(self.table.sublayers)
        return {p: self.table.seconds(empty, p, self.context) for p in PHASES}

    def _options(self, sublayer: Sublayer, change: StreamChange) -> Iterator[_Option]:
        """Yield what can be left out of a sublayer, other than nothing."""
        name = self._class(sublayer)
        if not name:
            return
        if "" in self.table.classes or sublayer != change.most():  # something must run
            skipped = _Option(sublayer, None, change.skipped[sublayer], {_SCALE: 1.0})
            yield skipped
            if sublayer.kind == "ffn":
                yield skipped.in_one("decode")
        for window, by_sublayer in change.windowed.items():
            changes = by_sublayer.get(sublayer, {})
            lost, full = 0.0, sorted(changes, key=changes.__getitem__)
            while full:  # the head that changes least is next
                lost += changes[full.pop(0)]
                narrow = Window(window.tokens, window.sinks, tuple(full))
                terms = window_terms(name, narrow, len(changes), str(sublayer))
                windowed = _Option(sublayer, narrow, lost, terms)
                yield from (windowed, *map(windowed.in_one, PHASES))

    def _saved(self, option: _Option, full: Mapping[Phase, float]) -> list[float]:
        """Return what an option saves of each goal, in parts of the full model's time."""
        name = self._class(option.sublayer)

        def saved(phase: Phase) -> float:
            if phase not in option.phases:
                return 0.0
            costs = (n * self.table.cost(t, phase, self.context) for t, n in option.terms.items())
            return self.table.cost(name, phase, self.context) - sum(costs)

        return [
            sum(w * saved(p) for p, w in goal.items()) / sum(w * full[p] for p, w in goal.items())
            for goal in goals_of(self.phase)
        ]

    def _chosen(self, plan: SkipPlan) -> str:
        said = f"{len(plan.skipped('decode'))} of {len(plan.sublayers)} sublayers skipped"
        windows = plan.windows.decode
        if not windows:
            return f"{said}, no windows"
        heads = dict(zip(self.table.sublayers, self.table.kv_heads, strict=True))
        narrow = sum(heads[s] - len(window.full_heads) for s, window in windows.items())
        whole = sum(not window.full_heads for window in windows.values())
        total = sum(heads.values())
        return f"{said}, windows in {narrow} of {total} K/V heads (whole layers: {whole})"

    def _no_windows(self, profile: Profile) -> str:
        """Return why no windows are offered and what to do; nothing if some are."""
        if profile.windows is None:
            return "the profile has no windows: calibrate(windows=[...]) would offer them"
        if not self.windows(profile):
            return (
                f"the table has no times of {profile.windows}: measure one with such windows "
                "(adaskip-fx measure --window)"
            )
        return ""

    def _out_of_reach(self, profile: Profile, alpha: float, saved: Iterable[float]) -> str:
        names = map(named, goals_of(self.phase))
        reached = {name: 1 / (1 - part) for name, part in zip(names, saved, strict=True)}
        best = f"{min(reached.values()):.3g}x ({min(reached, key=reached.__getitem__)})"
        more = self._no_windows(profile)
        return (
            f"alpha {alpha:g} cannot be met at {self.context:,} tokens: the best possible is "
            f"{best}; take a smaller alpha{f'. Besides, {more}' if more else ''}"
        )


@dataclass(frozen=True)
class _Option:
    """What may be left out of a sublayer.

    Attributes:
        sublayer: Of which.
        window: What its attention gets; None where it is skipped.
        lost: What that changes.
        terms: The cost terms that take the place of the sublayer's own.
        phases: In which it is left out.
    """

    sublayer: Sublayer
    window: Window | None
    lost: float
    terms: Mapping[str, float]
    phases: tuple[Phase, ...] = PHASES

    def in_one(self, phase: Phase) -> _Option:
        """Return the same in one phase, which changes half as much."""
        return replace(self, phases=(phase,), lost=self.lost / 2)


def _changed(plan: SkipPlan, profile: Profile) -> str:
    """Return what a plan changes; nothing where that was not measured."""
    windows = (*plan.windows.prefill.values(), *plan.windows.decode.values())
    skipped = plan.with_windows(Windows())
    try:
        change = StreamChange(profile, map(measured_as, windows))
    except ProfileError:
        return ""
    whole, by_skipping = change(plan), change(skipped)
    return (
        f"change of the stream: {by_skipping:.3g} by skipping and {whole - by_skipping:.3g} by "
        "windows (sums of 1 - cosine)"
    )
