"""Windows where they lose least: K/V heads, or whole layers, chosen by loss without any training.

A few heads carry what is far away ("retrieval heads": Wu et al., arXiv 2404.15574; DuoAttention,
arXiv 2410.10819, finds them by training gates). Here each head, or layer, is given a window alone
and judged by what the model then loses, on texts and on questions about them: text alone does not
miss a head that retrieves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.policies.candidates import Evaluator, cheapest

if TYPE_CHECKING:
    from adaskip_fx.latency.table import LatencyTable
    from adaskip_fx.latency.terms import Weights
    from adaskip_fx.profiles.profile import Profile

#: An attention sublayer, and which of its K/V heads get a window together.
Unit = tuple[Sublayer, tuple[int, ...]]

Start = Literal["full", "windowed"]

_BROKEN = 1e30  # stands for an infinite loss, since differences of those are no numbers


@dataclass(frozen=True)
class Windowed:
    """Give windows to the units that lose least by them.

    The search goes forward, from no window, adding the unit that loses least; or backward, from
    windows everywhere, restoring the unit that gains most, which knows better what units lose
    together where most have windows. Every unit is judged once in the beginning; at each step those
    that promised most when they were last judged are judged again beside what is chosen, until one
    keeps what the next one promised (Minoux, "Accelerated greedy algorithms for maximizing
    submodular set functions").

    Attributes:
        evaluator: Judges candidate plans; `CalibrationLoss` with texts longer than the window, and
            with questions.
        heads: How many K/V heads attention has, of each sublayer that may get a window:
            ``CalibrationLoss.kv_heads``, or a part of it.
        window: What a head sees that gets one.
        context: Tokens stored at which `alpha` counts.
        per: Whether a unit is a K/V head or a whole layer.
        shortlist: How many units are judged again at each step, at most; with 1 their losses in the
            beginning decide.
        start: Where the search begins: ``"full"`` attention, or ``"windowed"`` everywhere.
        samples: How many samples the evaluator judges on; None for all.
        table: Where there is one, `alpha` is the speed-up that it predicts at `context` tokens, not
            keys and values that are read; `measurement.measure` measures windows too.
        phase: In which phase, or in what of both, as for `LatencyTable.predict`.

    Raises:
        ValueError: A context that the window covers, no attention, or a shortlist below 1.
    """

    evaluator: Evaluator
    heads: Mapping[Sublayer, int]
    window: Window = field(default_factory=lambda: Window(256))
    context: int = 4096
    per: Literal["head", "layer"] = "head"
    shortlist: int = 1
    start: Start = "full"
    samples: int | None = None
    table: LatencyTable | None = None
    phase: Weights = "decode"

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ValueError(f"Windowed: shortlist must be at least 1, got {self.shortlist!r}")
        if self.per not in ("head", "layer"):
            raise ValueError(f"Windowed: per is 'head' or 'layer', got {self.per!r}")
        if self.start not in ("full", "windowed"):
            raise ValueError(f"Windowed: start is 'full' or 'windowed', got {self.start!r}")
        if not self.heads:
            raise ValueError("Windowed: there is no attention that can have a window")
        if self.window.full_heads:
            raise ValueError("Windowed: it chooses the heads; give a window without full_heads")
        if self.window.seen(self.context) >= self.context:
            raise ValueError(
                f"Windowed: a {self.window} sees all of {self.context} tokens; take a longer "
                "context, or a shorter window"
            )

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return a plan under which a step reads ``1 / alpha`` of the keys and values, or less.

        Counted are tokens of all K/V heads of `heads`, with `context` tokens stored. With a table,
        it is the plan that is `alpha` times as fast by it. Nothing is skipped, and both phases have
        the same windows.

        Raises:
            ValueError: `alpha` is below 1, or more than windows everywhere give.
        """
        return self.plans(profile, alpha)[-1]

    def plans(self, profile: Profile, alpha: float) -> tuple[SkipPlan, ...]:
        """Return the plan after each step, the first one that of `start`.

        Forward the last one is the first that is enough for `alpha`, backward the last one that is.

        Raises:
            ValueError: As for `plan`.
        """
        return self._steps(profile.sublayers, alpha)

    def search(
        self, sublayers: Sequence[Sublayer], alpha: float, start: Start | None = None
    ) -> SkipPlan:
        """Return what `plan` does, for a model without a profile.

        Args:
            sublayers: All of the model, in stream order.
            alpha: As for `plan`.
            start: Instead of `self.start`; if None, that from which fewer steps lead to `alpha`.

        Raises:
            ValueError: As for `plan`.
        """
        empty = SkipPlan.empty(sublayers)
        most = self._check(empty, alpha)
        far = most > 1 and 1 - 1 / alpha > (1 - 1 / most) / 2
        near: Start = "windowed" if far else "full"
        return replace(self, start=start or near)._steps(sublayers, alpha)[-1]

    def _steps(self, sublayers: Sequence[Sublayer], alpha: float) -> tuple[SkipPlan, ...]:
        empty, units = SkipPlan.empty(sublayers), self._units()
        backward = self._check(empty, alpha) >= alpha and self.start == "windowed"
        chosen = frozenset(units if backward else ())
        found, left = [self._windows(empty, chosen)], _Left(self.shortlist)

        def loss(unit: Unit | None = None) -> float:
            changed = chosen if unit is None else chosen ^ {unit}
            return min(self.evaluator(self._windows(empty, changed), self.samples), _BROKEN)

        left.judge(units, loss)
        while left and (backward or self.alpha_of(found[-1]) < alpha):
            chosen ^= {left.pop(loss)}
            plan = self._windows(empty, chosen)
            if backward and self.alpha_of(plan) < alpha:
                break
            found.append(plan)
        return tuple(found)

    def alpha_of(self, plan: SkipPlan) -> float:
        """Return how many times fewer keys and values a decode step reads, or the speed-up."""
        if self.table is not None:
            return self.table.predict(plan, self.phase, self.context)
        total = sum(self.heads.values()) * self.context
        return total / (total - self._saved(plan))

    def _saved(self, plan: SkipPlan) -> int:
        saved = 0
        for sublayer, window in plan.windows.decode.items():
            windowed = self.heads.get(sublayer, 0) - len(window.full_heads)
            saved += windowed * (self.context - window.seen(self.context))
        return saved

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that the table was not measured on.

        Raises:
            TableError: The message says what differs and what to do.
        """
        if self.table is not None:
            self.table.check(model)

    def _check(self, empty: SkipPlan, alpha: float) -> float:
        """Return the largest alpha that windows give."""
        most = self.alpha_of(self._windows(empty, self._units()))
        if not 1.0 <= alpha <= max(most, 1.0):
            raise ValueError(
                f"Windowed: alpha must be from 1 to {most:.3g}, which is what a {self.window} in "
                f"all of {sum(self.heads.values())} K/V heads gives at {self.context} tokens; got "
                f"{alpha!r}"
            )
        return most

    def _units(self) -> list[Unit]:
        units = list[Unit]()
        for sublayer, count in sorted(self.heads.items()):
            every = tuple(range(count))
            together = [every] if self.per == "layer" else [(head,) for head in every]
            units += [(sublayer, heads) for heads in together]
        return units

    def _windows(self, empty: SkipPlan, units: Iterable[Unit]) -> SkipPlan:
        windowed: dict[Sublayer, set[int]] = {}
        for sublayer, heads in units:
            windowed.setdefault(sublayer, set()).update(heads)
        windows = {}
        for sublayer, narrow in windowed.items():
            full = tuple(h for h in range(self.heads[sublayer]) if h not in narrow)
            windows[sublayer] = Window(self.window.tokens, self.window.sinks, full)
        return empty.with_windows(Windows.of(windows))


class _Left:
    """The units that have not changed yet, with what each one's change added when last judged."""

    def __init__(self, shortlist: int) -> None:
        self._shortlist = shortlist
        self._added: dict[Unit, float] = {}
        self._now = 0.0  # the loss of what is chosen

    def __len__(self) -> int:
        return len(self._added)

    def judge(self, units: Iterable[Unit], loss: Callable[..., float]) -> None:
        """Judge all of them: `loss` is that of what is chosen, and with a unit changed."""
        if self._shortlist > 1:
            self._now = loss()
        self._added = {unit: loss(unit) - self._now for unit in units}

    def pop(self, loss: Callable[..., float]) -> Unit:
        """Return the unit that is to change next."""

        def judge(unit: Unit) -> float:
            return loss(unit) - self._now if self._shortlist > 1 else self._added[unit]

        best = cheapest(self._added, judge, self._shortlist)
        self._now += self._added.pop(best)
        return best
