"""Skip, or give windows, where a second that is saved costs the least.

The greedy rule for knapsacks: of all moves (a sublayer is skipped, a layer or a head gets a window,
or a narrower one) the one with the least loss for a second that it saves, until the predicted time
is short enough. Losses are those of whole plans, so moves are judged beside what is chosen already;
as in Minoux's accelerated greedy those that promised most are judged again until one keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from adaskip_fx.plans.skip_plan import Action, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.policies.candidates import Evaluator, cheapest

if TYPE_CHECKING:
    from adaskip_fx.latency.table import LatencyTable
    from adaskip_fx.latency.terms import Weights
    from adaskip_fx.profiles.profile import Profile

_BROKEN = 1e30  # stands for an infinite loss, since differences of those are no numbers


@dataclass(frozen=True, order=True)
class Move:
    """A change of a plan.

    Attributes:
        sublayer: What changes.
        window: The window that it gets in both phases; None where it is skipped.
        head: The K/V head that gets it, -1 for all of them.
    """

    sublayer: Sublayer
    window: Window | None = None
    head: int = -1


@dataclass(frozen=True)
class TimedGreedy:
    """Choose what is skipped and what gets a window by loss for a second that is saved.

    Attributes:
        evaluator: Judges candidate plans, such as `CalibrationLoss`, with questions.
        table: Predicts the time of plans; one that was measured with `windows`.
        context: Tokens of a prompt, and tokens stored at a step, for which it predicts.
        phase: Which phase is to be faster, or how often each counts
            (``{"prefill": 1, "decode": 200}`` is a request of 200 new tokens).
        heads: How many K/V heads attention has that may get windows
            (``CalibrationLoss.kv_heads``); empty for none.
        windows: Those that attention may get.
        per: Whether single K/V heads get them, or whole layers.
        skip: Kinds of sublayers that may be skipped, as AdaSkip's scale of the stream (eq. 4).
        shortlist: How many moves are judged again at each step, at most.
        samples: How many samples the evaluator judges on; None for all.

    Raises:
        ValueError: Nothing may change, a window that names heads, or a shortlist below 1.
    """

    evaluator: Evaluator
    table: LatencyTable
    context: int
    phase: Weights = "decode"
    heads: Mapping[Sublayer, int] | None = None
    windows: tuple[Window, ...] = ()
    per: Literal["head", "layer"] = "layer"
    skip: tuple[str, ...] = ("attention", "ffn")
    shortlist: int = 4
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ValueError(f"TimedGreedy: shortlist must be at least 1, got {self.shortlist!r}")
        if self.per not in ("head", "layer"):
            raise ValueError(f"TimedGreedy: per is 'head' or 'layer', got {self.per!r}")
        if any(window.full_heads for window in self.windows):
            raise ValueError("TimedGreedy: it chooses the heads; give windows without full_heads")
        if not self.skip and not (self.windows and self.heads):
            raise ValueError("TimedGreedy: nothing may be skipped and nothing may get a window")

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that the table was not measured on.

        Raises:
            TableError: The message says what differs and what to do.
        """
        self.table.check(model)

    def describe(self, plan: SkipPlan) -> str:
        """Return a line with the speed-up that is predicted for a plan."""
        speed_up = self.table.predict(plan, self.phase, self.context)
        return f"predicted: {speed_up:.3g}x at {self.context:,} tokens"

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return a plan that is predicted to be `alpha` times as fast.

        Raises:
            ValueError: `alpha` is below 1, or no moves are left that save time before it is
                reached: the message says how far they go.
            TableError: The table is of another model, or has no such window.
        """
        return self.plans(profile, alpha)[-1]

    def plans(self, profile: Profile, alpha: float) -> tuple[SkipPlan, ...]:
        """Return the plan after each move, from the empty one on.

        Raises:
            ValueError, TableError: As for `plan`.
        """
        if not 1.0 <= alpha < math.inf:
            raise ValueError(f"TimedGreedy: alpha must be at least 1, got {alpha!r}")
        found = [SkipPlan.empty(profile.sublayers)]
        search = _Search(self, profile, found[0])
        while (reached := self.table.predict(found[-1], self.phase, self.context)) < alpha:
            better = search.next(found[-1])
            if better is None:
                raise ValueError(
                    f"TimedGreedy: alpha {alpha:g} cannot be met at {self.context:,} tokens: no "
                    f"move is left that saves time at {reached:.3g}x; take a smaller alpha"
                )
            found.append(better)
        return tuple(found)


class _Search:
    """The moves that are left, and what each one's second cost when it was last judged."""

    def __init__(self, policy: TimedGreedy, profile: Profile, empty: SkipPlan) -> None:
        self._policy = policy
        self._scales = profile.scales().factors
        self._cost: dict[Move, float] = {}
        self._now = self._loss(empty)
        self._judge(empty, list(self._moves(empty)))

    def next(self, plan: SkipPlan) -> SkipPlan | None:
        """Return the plan after the best move; None where none saves time."""
        if not self._cost:
            return None

        def judge(move: Move) -> float:
            self._judge(plan, [move])
            return self._cost[move]

        best = cheapest(self._cost, judge, self._policy.shortlist)
        if self._cost[best] == math.inf:  # of those that promised most none saves time any more
            self._judge(plan, list(self._cost))
            best = min(self._cost, key=lambda move: (self._cost[move], move))
        if self._cost[best] == math.inf:
            return None
        changed = self._changed(plan, best)
        self._now = self._loss(changed)
        del self._cost[best]
        left = set(self._moves(changed))
        again = [m for m in self._cost if m.sublayer == best.sublayer and m in left]
        self._cost = {m: cost for m, cost in self._cost.items() if m in left}
        self._judge(changed, again)
        return changed

    def _judge(self, plan: SkipPlan, moves: list[Move]) -> None:
        """Note what a second costs that each move saves; infinite where it saves nothing."""
        before = self._seconds(plan)
        for move in moves:
            changed = self._changed(plan, move)
            saved = before - self._seconds(changed)
            if saved <= 0:
                self._cost[move] = math.inf
                continue
            lost = self._loss(changed) - self._now
            # of moves that gain, the one that gains and saves the most
            self._cost[move] = lost / saved if lost > 0 else lost * saved

    def _loss(self, plan: SkipPlan) -> float:
        return min(self._policy.evaluator(plan, self._policy.samples), _BROKEN)

    def _seconds(self, plan: SkipPlan) -> float:
        table, policy = self._policy.table, self._policy
        return 1 / table.predict(plan, policy.phase, policy.context)  # of the full model's time

    def _moves(self, plan: SkipPlan) -> Iterator[Move]:
        """Yield every change that leaves out more."""
        policy = self._policy
        one_must_run = len(plan.decode) + 1 == len(plan.sublayers)
        for sublayer, name in zip(plan.sublayers, policy.table.classes, strict=True):
            if not name or plan.action("decode", sublayer) is not Action.RUN:
                continue
            if sublayer.kind in policy.skip and not one_must_run:
                yield Move(sublayer)
            heads = (policy.heads or {}).get(sublayer, 0)
            for window in policy.windows if heads else ():
                for head in range(heads) if policy.per == "head" else (-1,):
                    if _narrows(plan.windows.get("decode", sublayer), window, head):
                        yield Move(sublayer, window, head)

    def _changed(self, plan: SkipPlan, move: Move) -> SkipPlan:
        sublayer = move.sublayer
        windows = dict(plan.windows.decode)
        if move.window is None:
            windows.pop(sublayer, None)
            gone = {**plan.decode, sublayer: Action.SKIP}
            factors = {s: self._scales[s] for s in gone if s in self._scales}
            return SkipPlan(
                plan.sublayers,
                gone,
                gone,
                Surrogates.scale(factors),
                windows=Windows.of(windows),
            )
        windows[sublayer] = move.window
        if move.head >= 0:
            before, heads = plan.windows.get("decode", sublayer), (self._policy.heads or {})
            full = range(heads[sublayer]) if before is None else before.full_heads
            left = tuple(head for head in full if head != move.head)
            windows[sublayer] = replace(move.window, full_heads=left)
        return replace(plan, windows=Windows.of(windows))


def _narrows(before: Window | None, window: Window, head: int) -> bool:
    """Return whether a window for a head, or all, leaves out more of what is seen."""
    if before is None:
        return True
    if head < 0:
        return (window.tokens, window.sinks) < (before.tokens, before.sinks)
    alike = (window.tokens, window.sinks) == (before.tokens, before.sinks)
    return alike and head in before.full_heads
