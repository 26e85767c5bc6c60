"""The loss of a plan by a profile alone: how much of the residual stream each of its parts changes.

What is skipped and what sees a window are measured alike, as 1 - cosine of the stream with and
without: of a sublayer around it (AdaSkip, eq. 2), of a K/V head after its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, get_args

from adaskip_fx.plans.skip_plan import Phase, SkipPlan, Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.profiles.validation import ProfileError

if TYPE_CHECKING:
    from adaskip_fx.profiles.head_windows import HeadWindows
    from adaskip_fx.profiles.profile import Profile


class StreamChange:
    """An `Evaluator`: the sum of what a profile says of each sublayer, and head, alone.

    Attributes:
        skipped: What each sublayer changes where it is skipped.
        windowed: For each window, by sublayer and K/V head, what a head changes that sees it.
    """

    def __init__(self, profile: Profile, windows: Iterable[Window] = ()) -> None:
        """Take the numbers out of a profile.

        Args:
            profile: What calibration measured.
            windows: Those that plans to judge may have.

        Raises:
            ProfileError: A window was not measured.
        """
        lost = zip(profile.sublayers, 1 - profile.similarity(), strict=True)
        self.skipped = {s: max(float(value), 0.0) for s, value in lost}  # rounding: -1e-16
        self.windowed = {window: _by_sublayer(profile, window) for window in windows}

    def __call__(self, plan: SkipPlan, samples: int | None = None) -> float:
        """Return the sum over what is skipped, and the heads that see a window.

        What is left out in one phase alone counts half.
        """
        return sum(self._of_phase(plan, phase) for phase in get_args(Phase)) / 2

    def _of_phase(self, plan: SkipPlan, phase: Phase) -> float:
        narrow = (
            change
            for sublayer, window in plan.windows.of_phase(phase).items()
            for head, change in self.windowed[measured_as(window)][sublayer].items()
            if head not in window.full_heads
        )
        return sum(self.skipped[s] for s in plan.skipped(phase)) + sum(narrow)

    def most(self) -> Sublayer:
        """Return the sublayer that changes most where it is skipped."""
        return max(self.skipped, key=self.skipped.__getitem__)


def measured_as(window: Window) -> Window:
    """Return a window as it was measured: without heads that see everything."""
    return Window(window.tokens, window.sinks)


def _by_sublayer(profile: Profile, window: Window) -> Mapping[Sublayer, dict[int, float]]:
    """Return what a window changes of each K/V head, by sublayer and head."""
    found: dict[Sublayer, dict[int, float]] = {}
    for (sublayer, head), change in windows_of(profile).dissimilarity(window).items():
        found.setdefault(sublayer, {})[head] = change
    return found


def windows_of(profile: Profile) -> HeadWindows:
    """Return what was measured of windows.

    Raises:
        ProfileError: Nothing was.
    """
    if profile.windows is None:
        raise ProfileError(
            "this profile was measured without windows: calibrate again with windows=[...] "
            "(adaskip-fx calibrate --windows 256)"
        )
    return profile.windows
