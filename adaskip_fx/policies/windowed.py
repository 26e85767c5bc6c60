"""Windows where they lose least: K/V heads, or whole layers, chosen by loss without any training.

A few heads carry what is far away ("retrieval heads": Wu et al., arXiv 2404.15574; DuoAttention,
arXiv 2410.10819, finds them by training gates). Here each head, or layer, is given a window alone
and judged by what the model then loses, on texts and on questions about them: text alone does not
miss a head that retrieves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies.candidates import Evaluator

if TYPE_CHECKING:
    from adaskip_fx.profiles.profile import Profile

#: An attention sublayer, and which of its K/V heads get a window together.
Unit = tuple[Sublayer, tuple[int, ...]]


@dataclass(frozen=True)
class Windowed:
    """Give windows to one unit after another, those first that lose least alone.

    Attributes:
        evaluator: Judges candidate plans; `CalibrationLoss` with texts longer than the window, and
            with questions.
        heads: How many K/V heads attention has, of each sublayer that may get a window:
            ``CalibrationLoss.kv_heads``, or a part of it.
        window: What a head sees that gets one.
        context: Tokens stored at which `alpha` counts.
        per: Whether a unit is a K/V head or a whole layer.
        shortlist: How many units are tried at each step together with those chosen so far; with 1
            their losses alone decide.
        samples: How many samples the evaluator judges on; None for all.

    Raises:
        ValueError: A context that the window covers, no attention, or a shortlist below 1.
    """

    evaluator: Evaluator
    heads: Mapping[Sublayer, int]
    window: Window = field(default_factory=lambda: Window(256))
    context: int = 4096
    per: Literal["head", "layer"] = "head"
    shortlist: int = 1
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ValueError(f"Windowed: shortlist must be at least 1, got {self.shortlist!r}")
        if self.per not in ("head", "layer"):
            raise ValueError(f"Windowed: per is 'head' or 'layer', got {self.per!r}")
        if not self.heads:
            raise ValueError("Windowed: there is no attention that can have a window")
        if self.window.full_heads:
            raise ValueError("Windowed: it chooses the heads; give a window without full_heads")
        if self.window.seen(self.context) >= self.context:
            raise ValueError(
                f"Windowed: a {self.window} sees all of {self.context} tokens; take a longer "
                "context, or a shorter window"
            )

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return a plan under which a step reads ``1 / alpha`` of the keys and values, or less.

        Counted are tokens of all K/V heads of `heads`, with `context` tokens stored. Nothing is
        skipped, and both phases have the same windows.

        Raises:
            ValueError: `alpha` is below 1, or more than windows everywhere give.
        """
        return self.plans(profile, alpha)[-1]

    def plans(self, profile: Profile, alpha: float) -> tuple[SkipPlan, ...]:
        """Return the plan after each unit, from no window to as many as `alpha` needs.

        Raises:
            ValueError: As for `plan`.
        """
        self._check(alpha)
        empty = SkipPlan.empty(profile.sublayers)
        alone = {unit: self._loss(empty, [unit]) for unit in self._units()}
        left = sorted(alone, key=lambda unit: (alone[unit], unit))
        chosen, found = list[Unit](), [empty]
        while self.alpha_of(found[-1]) < alpha:
            tried = left[: self.shortlist]
            best = tried[0]
            if len(tried) > 1:
                best = min(tried, key=lambda unit: self._loss(empty, [*chosen, unit]))
            left.remove(best)
            chosen.append(best)
            found.append(self._windows(empty, chosen))
        return tuple(found)

    def alpha_of(self, plan: SkipPlan) -> float:
        """Return how many times fewer keys and values a decode step reads under a plan."""
        total = sum(self.heads.values()) * self.context
        return total / (total - self._saved(plan))

    def _saved(self, plan: SkipPlan) -> int:
        saved = 0
        for sublayer, window in plan.windows.decode.items():
            windowed = self.heads.get(sublayer, 0) - len(window.full_heads)
            saved += windowed * (self.context - window.seen(self.context))
        return saved

    def _check(self, alpha: float) -> None:
        most = self.context / self.window.seen(self.context)
        if not 1.0 <= alpha <= most:
            raise ValueError(
                f"Windowed: alpha must be from 1 to {most:.3g}, which is what a {self.window} in "
                f"all of {sum(self.heads.values())} K/V heads gives at {self.context} tokens; got "
                f"{alpha!r}"
            )

    def _units(self) -> list[Unit]:
        units = list[Unit]()
        for sublayer, count in sorted(self.heads.items()):
            every = tuple(range(count))
            together = [every] if self.per == "layer" else [(head,) for head in every]
            units += [(sublayer, heads) for heads in together]
        return units

    def _loss(self, empty: SkipPlan, units: list[Unit]) -> float:
        return self.evaluator(self._windows(empty, units), self.samples)

    def _windows(self, empty: SkipPlan, units: list[Unit]) -> SkipPlan:
        windowed: dict[Sublayer, set[int]] = {}
        for sublayer, heads in units:
            windowed.setdefault(sublayer, set()).update(heads)
        windows = {}
        for sublayer, narrow in windowed.items():
            full = tuple(h for h in range(self.heads[sublayer]) if h not in narrow)
            windows[sublayer] = Window(self.window.tokens, self.window.sinks, full)
        return empty.with_windows(Windows.of(windows))
