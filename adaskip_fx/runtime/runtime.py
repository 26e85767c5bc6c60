"""Selection at run time: which captured phase and which plan, for every step of a request.

`request_step` is the way through a request; how a step runs with the plan that it is given is
`step`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..capture.reference import ReferenceRun
from ..capture.traced_part import decoder_name, decoder_path, traced_forward
from ..kv_cache import saved
from ..kv_cache.argument_names import cache_argument, generate_argument
from ..kv_cache.cache import SkipCache
from ..kv_cache.padding import Padding
from ..plans.decisions import Decision, PlanChooser, of_model
from ..plans.skip_plan import SkipPlan
from ..programs.instruments import Instrument
from ..programs.program import Link, Program
from ..programs.program_cache import Graphs
from ..programs.variants import Counters
from ..speculation.speculation import Speculation
from ..utils.memory_budget import MemoryBudget
from . import turns
from .checking import Checker, checks
from .inputs import Inputs
from .request import Request
from .request_step import run_step
from .step import Runner
from .validate_decision import Validator
from .warmup import warm_up
from .window import Learner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..policies import OnlinePolicy
    from ..profiles.profile import Profile


class Runtime:
    """The engine of a compiled model, behind its ``forward``; `Handle` is what users see of it.

    Attributes:
        plan: What requests begin with: a plan, a schedule, or a choice by the first prompt.
        profile: What calibration measured; None when an explicit plan needs none.
        policy: It decides the online plan; None when nothing is learned while decoding.
        describe: What chose the plan says of a plan; None when nobody has something to say.
        cache_argument, generate_argument: What the model's forward calls its cache, and what
            ``generate`` calls it among what it keeps for forward.
        decoder_path: The attributes that lead to the decoder in a model around it; () if none is.
        graphs: What has been captured, compiled and linked.
        ranks: The processes that run the model together.
        budget: What is kept for later: graphs, programs, recordings and buffers.
        runner: It runs a step with the plan that is in force.
        buffer_pool: K/V buffers between requests.
        checker: What ``ADASKIP_CHECK=1`` has found.
        speculation: What drafts are made with; None where tokens are decoded one by one.
        ahead: Whether steps are begun before it is known that the request goes on, or that their
            mask is as before, so that a GPU need not wait for the host; the default on one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: PreTrainedModel,
        sample: ReferenceRun,
        plan: Decision | None,
        *,
        profile: Profile | None = None,
        policy: OnlinePolicy | None = None,
        describe: Callable[[SkipPlan], str] | None = None,
        backend: str = "inductor",
        link: Link = "pieces",
        budget: MemoryBudget | None = None,
        static_cache: bool | None = None,
    ) -> None:
        self.model = model
        forward = traced_forward(original, decoder_name(original))
        self.cache_argument = cache_argument(forward)
        self.generate_argument = generate_argument(forward)
        self.decoder_path = decoder_path(original)
        self.profile, self.policy, self.describe = profile, policy, describe
        self.graphs = Graphs(model, original, sample, backend, link, budget or MemoryBudget())
        self.budget, self.ranks = self.graphs.budget, self.graphs.ranks
        self.runner = Runner(self.graphs, static_cache)
        self.buffer_pool = self.runner.buffer_pool
        self.checker = Checker(self.graphs)
        self.ahead = self.device.type == "cuda"
        self.speculation: Speculation | None = None
        self._live: weakref.WeakSet[SkipCache] = weakref.WeakSet()
        self.graphs.capture_prefill(self.device)
        self.sublayers = self.graphs.sublayers
        self.plan: Decision = plan if plan is not None else SkipPlan.empty(self.sublayers)
        self._named: tuple[Decision, Decision] | None = None  # a plan, and it as `plan_of_model`
        self._valid = Validator(self.graphs, original)
        self._valid.check(self.plan)

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.graphs.device

    def set_plan(self, plan: Decision) -> None:
        """Have requests begin with `plan` from now on; running ones keep theirs.

        Raises:
            PlanError: The plan is for another model.
            UnsupportedError: The plan skips what cannot be skipped.
        """
        self._valid.check(plan)
        self.plan = plan

    def plan_of_model(self) -> Decision:
        """Return `plan` as one that says which model it is for."""
        plan, named = self.plan, self._named
        if named is None or named[0] is not plan:
            named = self._named = plan, of_model(plan, self._valid.fingerprint)
        return named[1]

    @property
    def static_cache(self) -> bool:
        """Whether steps of a few tokens work on whole buffers that stay where they are.

        On CUDA that makes each one graph (`StaticStep`); it is the default there.
        """
        return self.runner.static.enabled

    @static_cache.setter
    def static_cache(self, fixed: bool) -> None:
        self.runner.static.enabled = fixed

    @property
    def why_no_static_cache(self) -> str | None:
        """Why the model could not be captured that way; None if it could."""
        return self.runner.static.why_not

    @property
    def observer(self) -> Callable[[Program, SkipPlan, int], None] | None:
        """Is told of every step: the program, the plan in force, how many tokens of all rows."""
        return self.runner.observer

    @observer.setter
    def observer(self, observer: Callable[[Program, SkipPlan, int], None] | None) -> None:
        self.runner.observer = observer

    @property
    def counters(self) -> Counters:
        """Captures, links and dropped programs so far."""
        return self.graphs.counters

    @property
    def pieces_compiled(self) -> int:
        """How many distinct pieces have been compiled, over all captures."""
        return self.graphs.pieces_compiled

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling pieces."""
        return self.graphs.compile_seconds

    @property
    def cache_bytes(self) -> int:
        """Bytes of K/V storage that live requests hold."""
        return sum(cache.nbytes for cache in self.live_caches())

    def free(self) -> None:
        """Free the K/V buffers that are kept for later requests (on a GPU; see `buffer_pool`)."""
        self.buffer_pool.clear()

    @torch.no_grad()
    def warmup(self, max_length: int, batch_size: int = 1) -> None:
        """Capture, compile and link what first requests of this size need; see `Handle.warmup`."""
        turns.check_length(self.graphs, max_length)
        begins = self.plan.plans if isinstance(self.plan, PlanChooser) else (self.plan,)
        for begin in begins:
            warm_up(self, begin, max_length, batch_size)

    def __str__(self) -> str:
        from .report import runtime_report

        return runtime_report(self)

    def live_caches(self) -> list[SkipCache]:
        """The caches of requests that somebody still holds."""
        while True:
            try:
                return list(self._live)
            except RuntimeError:  # another thread has begun a request, or ended one
                continue

    def new_cache(
        self,
        capacity: int = 0,
        stop_tokens: torch.Tensor | None = None,
        plan: Decision | None = None,
        learn: bool = True,
        instrument: Instrument | None = None,
    ) -> SkipCache:
        """Return an empty cache for a new request.

        Args:
            capacity: How many tokens to make room for at once; it grows when that is not enough.
            stop_tokens: Ids after which a row has ended.
            plan: What the request begins with, if not `self.plan`.
            learn: Whether decoding may learn a plan of its own, as the policy says.
            instrument: What the request's programs do besides; such a request learns nothing.

        Raises:
            PlanError: The plan is for another model.
            UnsupportedError: The plan skips what cannot be skipped.
        """
        begin = plan if plan is not None else self.plan
        self._valid.check(begin)
        request = Request(
            begin, stop_tokens, learns=learn and instrument is None, instrument=instrument
        )
        specs, kept = self.graphs.specs, self.graphs.stored(request.plan)
        cache = SkipCache(self, specs, kept, self.model.dtype, self.device, capacity)
        cache.request, cache.retention = request, self.graphs.retention(request.plans)
        self.track(cache)
        return cache

    def load_cache(self, path: str | Path, plan: Decision | None = None) -> SkipCache:
        """A request's memory that ``cache.save(path)`` wrote, for a request that goes on from it.

        Args:
            path: the file.
            plan: what it was saved under, if not `self.plan`.

        Raises:
            SavedCacheError: it is damaged, newer, or of another model or plan.
        """
        since = self.graphs.states.begin()  # whose adapters the file's must be
        cache = saved.load_cache(self, path, plan)
        cache.request.since = since
        return cache

    def save_cache(self, cache: SkipCache, path: str | Path) -> None:
        """What ``cache.save(path)`` does; refused where the model is not what it was."""
        if cache.request.since is not None:
            self.graphs.states.require(cache.request.since)
        saved.save(cache, Path(path))

    def track(self, cache: SkipCache) -> None:
        """Count a cache among the live ones for as long as somebody holds it."""
        self._live.add(cache)

    def step(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: SkipCache,
        keep: int | torch.Tensor,
        padding: Padding | None = None,
    ) -> torch.Tensor:
        """Run the model on new tokens of a request; return logits [B, kept, V].

        Args:
            input_ids: int64 [B, T]; or embeddings [B, T, H] in their place.
            attention_mask: [B, stored + T], 0 at padding; None when there is none.
            position_ids: int64 [B or 1, T]; counted on from the cache when None.
            cache: the request's; the new tokens are added to it.
            keep: 0 for the logits of all new tokens, n for those of the last n; or int64 [K].
            padding: what the mask says, if it is that rows begin with padding and no more.
        """
        inputs = Inputs(input_ids, attention_mask, position_ids, padding)
        with self.ranks.step():
            return run_step(self, inputs, cache, keep)

    def may_run_ahead(self, cache: SkipCache) -> bool:
        """Whether a decode step may be begun that ``cache.crop(-1)`` may have to take back.

        Not while a window is open, or about to be: what was learned could not be taken back; nor
        can the state of a mixer. A schedule is no reason: its step is seen from the cache's length.
        """
        request: Request = cache.request
        learning = request.decode.learning
        longest = self.graphs.max_length  # a step that is one too many must not be refused
        room = longest is None or cache.length < longest
        going = request.decoding and not learning and not cache.stateful
        return self.ahead and room and going

    def may_suppose(self, cache: SkipCache) -> bool:
        """Whether a decode step may be begun before its mask is read: nobody sees it twice."""
        seen = self.observer is not None or cache.request.instrument is not None or checks()
        return not seen and self.may_run_ahead(cache)

    def learner(self) -> Learner | None:
        """Return what a turn learns with; None where nothing is learned."""
        if self.policy is None or self.profile is None:
            return None
        return Learner(self.policy, self.profile, self.graphs.structure.unskippable, self.ranks)
