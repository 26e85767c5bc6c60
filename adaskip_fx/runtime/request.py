"""The decode window: measure FFN sublayers over a request's first tokens, then decide.

Readings stay on the device and are added up there; the host reads them once, when the window
closes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plans.decisions import Choice, Schedule, plans_of
from ..plans.skip_plan import Action, SkipPlan, Sublayer

if TYPE_CHECKING:
    from ..capture.phase_graph import CapturedPhase
    from ..capture.state import Since
    from .static_step import DecodeBinding


@dataclass
class Window:
    """Readings of one request's decode window.

    Attributes:
        probed: the FFN sublayers that run and are measured.
        size: tokens to measure (the paper's P).
        steps: tokens measured so far.
        moments: sums [probed, batch, 5], float64, on the model's device.
    """

    probed: tuple[Sublayer, ...]
    size: int
    steps: int = 0
    moments: torch.Tensor | None = None

    @property
    def closed(self) -> bool:
        return self.steps >= self.size

    def add(self, reading: torch.Tensor) -> None:
        """Count one step's moments [probed, batch, 5]."""
        wide = reading.to(torch.float64)
        self.moments = wide if self.moments is None else self.moments + wide
        self.steps += 1

    def read(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Sums over the rows of the batch [probed, 5]; waits for the device."""
        assert self.moments is not None
        return self.moments.sum(1).cpu().numpy()


@dataclass
class Request:
    """What a compiled model remembers of one request, kept in the request's cache.

    Attributes:
        decision: what it was begun with.
        stop_tokens: ids after which a row has ended, on the device; None when not known.
        chosen: the plan that a `Choice` gave it; None before its first prompt.
        learns: whether a window opens when it begins to decode, if the policy learns.
        plan: the plan that the request's prompts run with, and its decoding at first.
        decode_plan: the plan in use for decoding: of the schedule's last step, or the online one
            once the window has closed.
        window: the decode window of the current turn; None before its first decoded token and
            where nothing is learned online.
        decoding: whether the current turn has begun to decode.
        decoding_from: tokens that were stored then.
        finished: rows [batch] that have ended; they count for nothing in the window.
        lane: what the decode steps of the turn repeat.
        since: the state of the model that the request began with; None before its first prompt.
        fixed: inputs that stay the same during the request (weights), by captured graph.
    """

    decision: SkipPlan | Schedule | Choice
    stop_tokens: torch.Tensor | None = None
    chosen: SkipPlan | None = None
    learns: bool = True
    plan: SkipPlan = field(init=False)
    decode_plan: SkipPlan = field(init=False)
    window: Window | None = field(init=False, default=None)
    decoding: bool = field(init=False, default=False)
    decoding_from: int = field(init=False, default=0)
    finished: torch.Tensor | None = field(init=False, default=None)
    lane: DecodeBinding | None = field(init=False, default=None, repr=False)
    since: Since | None = field(init=False, default=None, repr=False)
    fixed: dict[CapturedPhase, tuple[Any, ...]] = field(
        init=False, default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        self.plan = self.decode_plan = self.chosen or plans_of(self.decision)[0]

    @property
    def undecided(self) -> bool:
        """Whether the first prompt is still to choose the plan."""
        return isinstance(self.decision, Choice) and self.chosen is None

    def fresh(self) -> Request:
        """The state at the beginning of another turn: nothing learned yet."""
        turn = replace(self)
        turn.since = self.since
        return turn

    def anew(self, chosen: SkipPlan | None = None) -> Request:
        """The state at the beginning of another request; `chosen`: its plan, if one was chosen."""
        return Request(self.decision, self.stop_tokens, chosen, self.learns)

    def decode_with(self, plan: SkipPlan) -> None:
        """Have decode steps run with `plan` from now on, and learn nothing from them.

        For whoever times, warms up or compares plans on one request that is no schedule's. What
        `plan` runs must have been stored: it skips whatever the request's own plan does, or more.
        """
        self.learns, self.window, self.decode_plan = False, None, plan

    def copy(self) -> Request:
        """The same state for a second request with the same past."""
        twin = self.fresh()
        for name in ("decode_plan", "decoding", "decoding_from", "finished"):
            setattr(twin, name, getattr(self, name))
        twin.window = replace(self.window) if self.window is not None else None
        return twin

    def plan_at(self, length: int) -> SkipPlan:
        """The plan for a decode step with `length` tokens stored.

        Of a schedule by how many tokens the turn has decoded, which is seen from the cache's
        length: so a token that is taken back takes its step back.
        """
        if isinstance(self.decision, Schedule):
            self.decode_plan = self.decision.at(length - self.decoding_from)
        return self.decode_plan

    def probed(self) -> tuple[Sublayer, ...]:
        """What the next decode step measures."""
        if self.window is None or self.window.closed:
            return ()
        return self.window.probed

    def valid_rows(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Which rows of a decode step [batch, 1] have not ended, the step's tokens included.

        None when no row can end. A few small operations: the device waits for them in every step.
        """
        if self.stop_tokens is None:
            return None
        ended = (input_ids == self.stop_tokens).any(1)
        self.finished = ended if self.finished is None else self.finished | ended
        return ~self.finished.unsqueeze(1)


def probed_in_decode(plan: SkipPlan) -> tuple[Sublayer, ...]:
    """The FFN sublayers that a plan still runs while decoding."""
    return tuple(
        s for s in plan.sublayers if s.kind == "ffn" and plan.action("decode", s) is Action.RUN
    )
