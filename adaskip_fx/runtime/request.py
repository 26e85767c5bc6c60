"""A request: what a compiled model remembers of it between its steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ..kv_cache.retention import widened
from ..plans.decisions import Decision, PlanChooser, Schedule, plans_of
from ..plans.skip_plan import Action, PlanError, SkipPlan
from .window import DecodePlans, Window

if TYPE_CHECKING:
    from ..capture.phase_graph import CapturedPhase
    from ..capture.state import Since
    from ..capture.states import States
    from ..plans.sublayer import Sublayer
    from ..programs.instruments import Instrument
    from ..programs.program import Program
    from .static_step import StaticBinding
    from .view_binding import ViewBinding


@dataclass
class Request:
    """What a compiled model remembers of one request, kept in the request's cache.

    Attributes:
        decision: What it began with.
        stop_tokens: Ids after which a row has ended, on the device; None when they are not known.
        chosen: The plan that a `PlanChooser` gave it; None before its first prompt.
        learns: Whether a window opens when it begins to decode, if the policy learns.
        instrument: What its programs do besides; None for nothing.
        offsets: How far positions are behind the tokens after images, [B or fewer, 1], where the
            model keeps that on itself; None where it keeps nothing.
        left_out: Whether `decode_with` had its steps run with a plan that leaves something out.
        plan: The plan that its prompts run with, and its decoding at first.
        decode: The plans of the current turn's decode steps.
        decoding: Whether the current turn has begun to decode.
        decoding_from: How many tokens were stored then.
        finished: Rows, bool [B], that have ended; they count for nothing in the window.
        bindings: What the turn's steps on a static cache repeat, by number of tokens and plan.
        on_views: What its last step repeats that was handed views.
        agreed: The digest of the last plan that all ranks were seen to run; None before.
        since: The state of the model that the request began with; None before its first prompt.
        weights: The inputs that stay the same during the request, by captured graph, for
            as long as that is kept.
    """

    decision: Decision
    stop_tokens: torch.Tensor | None = None
    chosen: SkipPlan | None = None
    learns: bool = True
    instrument: Instrument | None = field(default=None, repr=False)
    offsets: torch.Tensor | None = field(default=None, repr=False)
    left_out: bool = False
    plan: SkipPlan = field(init=False)
    decode: DecodePlans = field(init=False)
    decoding: bool = field(init=False, default=False)
    decoding_from: int = field(init=False, default=0)
    finished: torch.Tensor | None = field(init=False, default=None)
    bindings: dict[tuple[int, SkipPlan], StaticBinding] = field(
        init=False, default_factory=dict, repr=False
    )
    on_views: ViewBinding | None = field(init=False, default=None, repr=False)
    agreed: str | None = field(init=False, default=None, repr=False)
    since: Since | None = field(init=False, default=None, repr=False)
    weights: WeakKeyDictionary[CapturedPhase, tuple[Any, ...]] = field(
        init=False, default_factory=WeakKeyDictionary, repr=False
    )

    def __post_init__(self) -> None:
        self.plan = self.chosen or plans_of(self.decision)[0]
        schedule = self.decision if isinstance(self.decision, Schedule) else None
        self.decode = DecodePlans(schedule or self.plan)

    @property
    def begun(self) -> Since:
        """The state of the model that the request began with."""
        assert self.since is not None, "a request begins with a prompt"
        return self.since

    def weights_of(
        self, program: Program, arguments: dict[str, Any], length: int, states: States
    ) -> tuple[Any, ...]:
        """Return the inputs that stay the same, looked up at the first step of a captured graph.

        Args:
            program: It is about to run.
            arguments: Those of the captured function.
            length: Tokens stored.
            states: Of the model.
        """
        weights = self.weights.get(program.captured)
        if weights is None:
            if length:  # at its beginning the model was looked at just now
                states.require(self.begun)
            weights = self.weights[program.captured] = program.captured.weights(arguments)
        return weights

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        """The plans that its steps may run; what is learned leaves out more of the first one."""
        return (self.chosen,) if self.chosen is not None else plans_of(self.decision)

    @property
    def undecided(self) -> bool:
        """Whether the first prompt is still to choose the plan."""
        return isinstance(self.decision, PlanChooser) and self.chosen is None

    @property
    def decode_plan(self) -> SkipPlan:
        """The plan of the last decode step: of a schedule, or the learned one after the window."""
        return self.decode.plan

    @property
    def window(self) -> Window | None:
        """The decode window of the current turn; None before it and where nothing is learned."""
        return self.decode.window

    def new_turn(self) -> Request:
        """Return the state at the beginning of another turn: nothing learned yet."""
        turn = replace(self)
        turn.since = self.since
        return turn

    def new_request(self, chosen: SkipPlan | None = None) -> Request:
        """Return the state at the beginning of another request.

        Args:
            chosen: Its plan, if one was chosen.
        """
        return replace(self, chosen=chosen)

    def decode_with(self, plan: SkipPlan) -> None:
        """Have decode steps of this turn run with `plan` from now on; this request learns no more.

        This is for whoever times, warms up or compares plans on one request. Tokens decoded under a
        plan that skips attention which the request stores leave holes in its K/V: crop them before
        another plan, or another turn, reads them.

        Args:
            plan: It runs nothing whose K/V or state the request's own plan does not store, and
                widens no window.

        Raises:
            PlanError: It does.
        """
        self.check_stored(plan)
        self.learns, self.decode = False, DecodePlans(plan)
        if plan.decode or plan.windows:
            self.left_out = True

    def check_stored(self, plan: SkipPlan) -> None:
        """Refuse to decode with a plan that reads what this request does not store.

        Raises:
            PlanError: It does.
        """

        def needs(sublayer: Sublayer) -> bool:
            stored = self.plan.action("prefill", sublayer) is not Action.SKIP
            skipped = plan.action("decode", sublayer) is Action.SKIP
            return sublayer.kind != "ffn" and not stored and not skipped

        wider = widened(self.plans, plan)
        if wider is not None:
            raise PlanError(
                f"{wider} sees more under this plan than under the request's own windows, which is "
                "not held; begin a request with the wider ones"
            )
        missing = [str(s) for s in plan.sublayers if needs(s)]
        if missing:
            raise PlanError(
                f"this request stores nothing for {', '.join(missing)}, which its prompts skip, so "
                "no decode step can run it; decode with a plan that skips it too"
            )

    def copy(self) -> Request:
        """Return the same state for a second request with the same past."""
        twin = self.new_turn()
        twin.decode, twin.finished = self.decode.copy(), self.finished
        twin.decoding, twin.decoding_from = self.decoding, self.decoding_from
        return twin

    def of_rows(self, rows: torch.Tensor, batch: int) -> Request:
        """Return the state for other rows: what was measured of each, and which have ended.

        Args:
            rows: int64 [B'], the old row of each new one.
            batch: How many there were, B.
        """
        twin = self.copy()
        if twin.offsets is not None:
            beams = batch // twin.offsets.shape[0]
            of_each = twin.offsets.repeat_interleave(beams, 0)
            twin.offsets = of_each.index_select(0, rows.to(of_each.device))
        if twin.finished is not None:
            twin.finished = twin.finished.index_select(0, rows.to(twin.finished.device))
        if twin.window is not None:
            twin.decode.window = twin.window.of_rows(rows)
        return twin

    def plan_at(self, length: int) -> SkipPlan:
        """Return the plan for a decode step with `length` tokens stored.

        How many tokens the turn has decoded is seen from the cache's length: so a token that is
        taken back takes its step back.
        """
        return self.decode.at(length - self.decoding_from)

    def valid_rows(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Return which rows of a decode step, bool [B, 1], have not ended; None if no row can end.

        The step's tokens int64 [B, 1] are counted in. These are a few small operations: the device
        waits for them in every step.
        """
        if self.stop_tokens is None:
            return None
        ended = (input_ids == self.stop_tokens).any(1)
        self.finished = ended if self.finished is None else self.finished | ended
        return ~self.finished.unsqueeze(1)
