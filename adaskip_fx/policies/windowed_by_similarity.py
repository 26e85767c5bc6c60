"""Windows where the residual stream changes least: K/V heads, or layers, chosen by a profile alone.

AdaSkip's measure, of a part of a sublayer: the cosine between the stream as it is and as it would
be if a K/V head saw a window. What calibration measured for each head alone is added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.policies.stream_change import StreamChange, windows_of
from adaskip_fx.policies.windowed import Windowed

if TYPE_CHECKING:
    from adaskip_fx.latency.table import LatencyTable
    from adaskip_fx.latency.terms import Weights
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class WindowedBySimilarity:
    """Give a window to the K/V heads, or layers, whose own window changes the stream least.

    It needs a profile that was measured with the window (``calibrate(..., windows=[...])``), and
    neither trains nor runs a model; `Windowed` judges by a loss, which knows more and takes a run
    for each head. A head that carries what is far away shows on texts that refer back.

    Attributes:
        window: What a head sees that gets one; if None, that of the profile's windows whose plan
            changes least.
        context: Tokens stored at which `alpha` counts.
        per: Whether to choose K/V heads or whole layers, whose heads' changes are added.
        table: Where there is one, `alpha` is the speed-up that it predicts at `context` tokens, not
            keys and values that are read.
        phase: In which phase, or in what of both, as for `LatencyTable.predict`.

    Raises:
        ValueError: An unknown `per`.
    """

    window: Window | None = None
    context: int = 4096
    per: Literal["head", "layer"] = "head"
    table: LatencyTable | None = None
    phase: Weights = "decode"

    def __post_init__(self) -> None:
        if self.per not in ("head", "layer"):
            raise ValueError(f"WindowedBySimilarity: per is 'head' or 'layer', got {self.per!r}")

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return a plan under which a step reads ``1 / alpha`` of the keys and values, or less.

        Nothing is skipped, and both phases have the same windows. `alpha` counts as for `Windowed`.

        Raises:
            ValueError: `alpha` is below 1 or more than windows everywhere give, or the window sees
                all of `context`.
            ProfileError: The profile has no windows, or not this one.
        """
        return self.plans(profile, alpha)[-1]

    def plans(self, profile: Profile, alpha: float) -> tuple[SkipPlan, ...]:
        """Return the plans with one more head or layer each, from none to what `alpha` needs.

        Raises:
            ValueError, ProfileError: As for `plan`.
        """
        measured, found, refused = windows_of(profile), [], []
        for window in sorted(measured.windows) if self.window is None else (self.window,):
            try:
                search = self._search(profile, window)
                plans = search.plans(profile, alpha)
            except ValueError as error:  # another window may do
                refused.append(error)
            else:
                found.append((search.evaluator(plans[-1], None), plans))
        if not found:
            raise refused[0]  # that of the narrowest, which gives most
        return min(found, key=lambda change_and_plans: change_and_plans[0])[1]

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that the table was not measured on.

        Raises:
            TableError: The message says what differs and what to do.
        """
        if self.table is not None:
            self.table.check(model)

    def _search(self, profile: Profile, window: Window) -> Windowed:
        """Return the search whose loss is the sum of what was measured of a window."""
        return Windowed(
            StreamChange(profile, (window,)),
            windows_of(profile).kv_heads,
            window,
            self.context,
            self.per,
            table=self.table,
            phase=self.phase,
        )
