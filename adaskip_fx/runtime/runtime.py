"""Selection at run time: which captured phase and which plan, for every step of a request.

`step` is the way through a request; how a step runs with the plan that it is given is `step`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..capture.graph_key import GraphPhase
from ..capture.reference import ReferenceRun
from ..capture.state import Since
from ..kv_cache import saved
from ..kv_cache.cache import SkipCache
from ..kv_cache.names import cache_argument, generate_argument
from ..plans.decisions import Choice, Decision, Stages, plans_of
from ..plans.skip_plan import SkipPlan
from ..programs.instruments import LayerProgram
from ..programs.program import Counters, Link, Program, plan_phase
from ..programs.program_cache import Graphs
from .checking import Checker, checks
from .inputs import Inputs
from .prompts import mean_embedding
from .request import Request, Window, probed_in_decode
from .step import Runner
from .validate import validate_decision
from .warmup import warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..policies import OnlinePolicy
    from ..profiles.profile import Profile


class Runtime:
    """What a compiled model does behind its ``forward``; also its ``.adaskip`` attribute.

    Attributes:
        decision: what requests begin with: a plan, a schedule, a choice or a plan per stage.
        stage: which of a plan per stage requests begin with: the first, until another is set.
        profile: what calibration measured; None when an explicit plan needs none.
        policy: decides the online plan; None when nothing is learned while decoding.
        cache_argument: what the model's forward calls its cache.
        generate_argument: what ``generate`` calls it among what it keeps for forward.
        graphs: what has been captured, compiled and linked.
        runner: runs a step with the plan that is in force.
        storages: K/V buffers between requests.
        checker: what ``ADASKIP_CHECK=1`` has found.
        ahead: ``generate`` begins a step before it knows that the request goes on, so that a GPU
            need not wait for the host; the default on one.
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
        backend: str = "inductor",
        link: Link = "pieces",
        max_variants: int = 32,
        static_cache: bool | None = None,
    ) -> None:
        self.model = model
        self.cache_argument = cache_argument(type(original).forward)
        self.generate_argument = generate_argument(type(original).forward)
        self.profile = profile
        self.policy = policy
        self.graphs = Graphs(model, original, sample, backend, link, max_variants)
        self.runner = Runner(self.graphs, static_cache)
        self.buffer_pool = self.runner.buffer_pool
        self.checker = Checker(self.graphs)
        self.ahead = self.device.type == "cuda"
        self._live: weakref.WeakSet[SkipCache] = weakref.WeakSet()
        self.graphs.capture_prefill(self.device)
        self.sublayers = self.graphs.sublayers
        self.decision: Decision = plan if plan is not None else SkipPlan.empty(self.sublayers)
        self.stage = plan.stages[0][0] if isinstance(plan, Stages) else None
        validate_decision(self.decision, self.graphs, type(model).__name__)
        self._admitted: Decision = self.decision  # the last one that was

    # What a user asks of it ------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return self.runner.device

    @property
    def plan(self) -> SkipPlan:
        """The plan that requests begin with; of a choice, its first option's."""
        given = self.decision
        return given.plan(self.stage) if isinstance(given, Stages) else plans_of(given)[0]

    @plan.setter
    def plan(self, plan: SkipPlan) -> None:
        self.decision = plan

    @property
    def static_cache(self) -> bool:
        """Whether decode steps without padding work on whole buffers that stay where they are.

        On CUDA that makes them one graph (`StaticDecodeStep`); it is the default there.
        """
        return self.runner.static_cache

    @static_cache.setter
    def static_cache(self, fixed: bool) -> None:
        self.runner.static_cache = fixed

    @property
    def why_no_static_cache(self) -> str | None:
        """Why the model could not be captured that way; None if it could."""
        return self.runner.why_no_static_cache

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
        """Free the K/V buffers that are kept for the next request (on a GPU; see `buffer_pool`)."""
        self.buffer_pool.clear()

    @torch.no_grad()
    def warmup(self, max_length: int, batch_size: int = 1) -> None:
        """Capture, compile and link what a first request needs, so that it does not wait.

        Args:
            max_length: tokens of the longest request to come.
            batch_size: rows of the requests to come.
        """
        self.check_length(max_length)
        given = self.decision
        for begin in given.plans if isinstance(given, Choice | Stages) else (given,):
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

    # Requests --------------------------------------------------------------------------------

    def new_cache(
        self,
        capacity: int = 0,
        stop_tokens: torch.Tensor | None = None,
        plan: Decision | None = None,
        learn: bool = True,
    ) -> SkipCache:
        """An empty cache for a new request.

        Args:
            capacity: tokens to make room for at once; it grows when that is not enough.
            stop_tokens: ids after which a row has ended.
            plan: what the request begins with, if not `self.decision`.
            learn: whether decoding may learn a plan of its own, as the policy says.
        """
        given = plan if plan is not None else self.decision
        if given is not self._admitted:
            validate_decision(given, self.graphs, type(self.model).__name__)
            self._admitted = given
        begin = given.plan(self.stage) if isinstance(given, Stages) else given
        request = Request(begin, stop_tokens, learns=learn)
        specs, kept = self.graphs.specs, self.graphs.stored(request.plan)
        cache = SkipCache(self, specs, kept, self.model.dtype, self.device, capacity)
        cache.request = request
        self.track(cache)
        return cache

    def load_cache(self, path: str | Path, plan: Decision | None = None) -> SkipCache:
        """A request's memory that ``cache.save(path)`` wrote, for a request that goes on from it.

        Args:
            path: the file.
            plan: what it was saved under, if not `self.decision`.

        Raises:
            SavedCacheError: it is damaged, newer, or of another model or plan.
        """
        return saved.load_cache(self, path, plan)

    def save_cache(self, cache: SkipCache, path: str | Path) -> None:
        """What ``cache.save(path)`` does."""
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
        logits_to_keep: int,
    ) -> torch.Tensor:
        """Run the model on new tokens of a request; returns logits [B, kept, V].

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, stored + T], 0 at padding; None when there is none.
            position_ids: int64 [B or 1, T]; counted on from the cache when None.
            cache: the request's; the new tokens are added to it.
            logits_to_keep: 0 for the logits of all new tokens, else of the last n.
        """
        phase = self._phase(input_ids, cache)
        if not cache.length or cache.request.since is None:  # of a file, or another's cache
            self._begin(cache)
        elif phase != "decode" or checks():
            self.graphs.states.require(cache.request.since)
        request = self._turn(cache, phase)
        inputs = Inputs(input_ids, attention_mask, position_ids)
        if request.undecided:
            request = self._choose(cache, inputs)
        plan, moments = request.plan, None
        if phase == "decode":
            plan, probed = request.plan_at(cache.length), request.probed()
            logits, moments = self.runner.run(phase, request, plan, probed, inputs, cache, 1)
        else:
            logits = self.runner.run_prompt(phase, request, inputs, cache, logits_to_keep)
        cache.request = request  # only now: a step that was refused has changed nothing
        if checks():
            state = request.since.state if request.since is not None else self.graphs.states.current
            self.checker.compare(plan, plan_phase(phase), inputs, cache, state, logits)
        if moments is not None:
            self._learn(request, moments)
        return logits

    def _choose(self, cache: SkipCache, inputs: Inputs) -> Request:
        """The request with the plan for its first prompt; the cache stores what that plan runs."""
        request: Request = cache.request
        assert isinstance(request.decision, Choice)
        embedding = mean_embedding(self.model, inputs.input_ids, inputs.attention_mask)
        chosen = request.decision.nearest(embedding.cpu().numpy()).plan
        cache.keep(self.graphs.stored(chosen))
        begun = request.anew(chosen)
        begun.since = request.since
        return begun

    def may_run_ahead(self, cache: SkipCache) -> bool:
        """Whether a decode step may be begun that ``cache.crop(-1)`` may have to take back.

        Not while a window is open, or about to be: what was learned could not be taken back; nor
        can the state of a mixer. A schedule is no reason: its step is seen from the cache's length.
        """
        request: Request = cache.request
        learning = request.window is not None and not request.window.closed
        return self.ahead and request.decoding and not learning and not cache.stateful

    def measure(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        layers: bool = False,
    ) -> torch.Tensor:
        """Moments of every sublayer of the full model over a prompt, [sublayers, B, 5].

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 at padding, which counts for nothing.
            layers: whether those of whole layers follow, [sublayers + layers, B, 5].
        """
        if layers:
            self.graphs.program_type, before = LayerProgram, self.graphs.program_type
            try:
                return self.measure(input_ids, attention_mask)
            finally:
                self.graphs.program_type = before
        empty = SkipPlan.empty(self.sublayers)
        cache = self.new_cache(capacity=input_ids.shape[1], plan=empty)
        phase = self._phase(input_ids, cache)
        self._begin(cache)
        inputs = Inputs(input_ids, attention_mask)
        _, moments = self.runner.run(phase, cache.request, empty, self.sublayers, inputs, cache, 1)
        assert moments is not None
        return moments

    def check_length(self, total: int) -> None:
        """Refuse a prompt that is longer than the model's positions."""
        longest = self.graphs.max_length
        if longest is not None and total > longest:
            raise ValueError(
                f"the prompt would make a sequence of {total} tokens, but "
                f"{type(self.model).__name__} has positions for {longest} "
                "(max_position_embeddings); shorten it"
            )

    # How it is done --------------------------------------------------------------------------

    def _phase(self, input_ids: torch.Tensor, cache: SkipCache) -> GraphPhase:
        if cache.length and input_ids.shape[1] == 1 and not cache.prompting:
            return "decode"
        self.check_length(cache.length + input_ids.shape[1])
        return "extend" if cache.length else "prefill"

    def _begin(self, cache: SkipCache) -> None:
        """A request begins: in the state that the model is in now, which it keeps."""
        state, request = self.graphs.states.look(), cache.request
        request.since = Since.of(state)
        request.fixed.clear()
        request.lane = None
        if not cache.length:
            specs, kept = state.reference.specs, self.graphs.stored(request.plan)
            cache.renew(specs, kept, self.model.dtype, self.device)

    def _turn(self, cache: SkipCache, phase: GraphPhase) -> Request:
        """The request's state for this step; a prompt after decoded tokens begins a new turn."""
        request: Request = cache.request
        if phase != "decode":
            if request.decoding:
                return request.fresh()
        elif not request.decoding:
            request.decoding, request.decoding_from = True, cache.length
            # nothing is learned beside a schedule or choice
            if request.learns and request.decision is request.plan:
                request.window = self._new_window(request.plan)
        return request

    def _new_window(self, plan: SkipPlan) -> Window | None:
        """None when nothing can be learned: no policy, or nothing skipped to compare with."""
        if self.policy is None or not self.policy.online or not plan.skipped("prefill"):
            return None
        unskippable = self.graphs.unskippable
        probed = tuple(s for s in probed_in_decode(plan) if s not in unskippable)
        return Window(probed, self.policy.window) if probed else None

    def _learn(self, request: Request, moments: torch.Tensor) -> None:
        window = request.window
        assert window is not None
        window.add(moments)
        if window.closed:
            assert self.policy is not None
            assert self.profile is not None
            request.decode_plan = self.policy.online_plan(
                self.profile, request.plan, window.read(), window.probed
            )
