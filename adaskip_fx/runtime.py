"""Selection at run time: which captured phase, which plan, which program, for every step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from adaskip_passes import Recorder, RefusedError

from . import phases
from .admission import admit
from .cache import SkipCache
from .decisions import Choice, Decision, Schedule, Stages, plans_of
from .decoding import Decoder, Lane
from .graphs import Graphs
from .layers import LayerProgram
from .online import Request, Window, probed_in_decode
from .phases import Forward, GraphKey, GraphPhase, Memory
from .plan import Action, SkipPlan, Sublayer
from .programs import Counters, Link, Program
from .prompts import Inputs, cut_last_token, mean_embedding
from .sample import Sample
from .storage import Slot, Storage, StoragePool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .policies import OnlinePolicy
    from .profile import Profile


class Runtime:
    """What a compiled model does behind its ``forward``; also its ``.adaskip`` attribute.

    Attributes:
        decision: what requests begin with: a plan, a schedule, a choice or a plan per stage.
        stage: which of a plan per stage requests begin with: the first, until another is set.
        profile: what calibration measured; None when an explicit plan needs none.
        policy: decides the online plan; None when nothing is learned while decoding.
        cache_argument: what the model's forward calls its cache.
        graphs: what has been captured, compiled and linked.
        fixed_addresses: decode steps without padding work on whole buffers that stay where they
            are (`Decoder`), which on CUDA makes them one graph; the default there.
        ahead: ``generate`` begins a step before it knows that the request goes on, so that a GPU
            need not wait for the host; the default there.
        why_not_fixed: why the model could not be captured that way; None if it could.
        storages: K/V buffers between requests.
        observer: is told of every step: the program that ran, the plan in force and how many
            tokens (rows times tokens).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Forward,
        sample: Sample,
        plan: Decision | None,
        *,
        profile: Profile | None = None,
        policy: OnlinePolicy | None = None,
        backend: str = "inductor",
        link: Link = "pieces",
        max_variants: int = 32,
        fixed_addresses: bool | None = None,
    ) -> None:
        self.model = model
        self.forward = forward
        self.cache_argument = phases.cache_argument(forward)
        self.profile = profile
        self.policy = policy
        self._parameter = next(name for name, _ in model.named_parameters())
        on_gpu = self.device.type == "cuda"
        self.fixed_addresses = on_gpu if fixed_addresses is None else fixed_addresses
        self.ahead = on_gpu
        self.why_not_fixed: str | None = None
        self.observer: Callable[[Program, SkipPlan, int], None] | None = None
        self.storages = StoragePool(keep=self.fixed_addresses)
        self._recorder: Recorder | None = None  # on a GPU, at the first decode step
        self.graphs = Graphs(model, forward, sample, backend, link, max_variants)
        self._live: weakref.WeakSet[SkipCache] = weakref.WeakSet()
        self.sublayers = self._prove()
        self._memory = self.graphs.memory
        self._unskippable = self.graphs.unskippable
        self.decision: Decision = plan if plan is not None else SkipPlan.empty(self.sublayers)
        self.stage = plan.stages[0][0] if isinstance(plan, Stages) else None
        admit(self.decision, self.graphs, type(model).__name__)
        self._admitted: Decision = self.decision  # the last one that was

    # What a user asks of it ------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are now (`PreTrainedModel.device` looks at all modules for that)."""
        device: torch.device = self.model.get_parameter(self._parameter).device
        return device

    @property
    def plan(self) -> SkipPlan:
        """The plan that requests begin with; of a choice, its first option's."""
        given = self.decision
        return given.plan(self.stage) if isinstance(given, Stages) else plans_of(given)[0]

    @plan.setter
    def plan(self, plan: SkipPlan) -> None:
        self.decision = plan

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
        return sum(cache.nbytes for cache in self._live)

    def free(self) -> None:
        """Free the K/V buffers that are kept for the next request (on a GPU; see `storages`)."""
        self.storages.clear()

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
            self._warm(begin, max_length, batch_size)

    def _warm(self, begin: SkipPlan | Schedule, max_length: int, batch_size: int) -> None:
        cache = self.new_cache(capacity=max_length, plan=begin)
        prompt = torch.zeros(batch_size, max(2, min(max_length - 1, 16)), dtype=torch.int64)
        prompt = prompt.to(self.device)
        for ids in (prompt, prompt[:, :1]):
            self.step(ids, None, None, cache, 1)
        if cache.request.window is not None:  # the program after the window as well
            cache.request.window = None
            self.step(prompt[:, :1], None, None, cache, 1)
        for first, _ in begin.steps[1:] if isinstance(begin, Schedule) else ():
            if not cache.stateful:
                cache.crop(prompt.shape[1])  # as far as there may be room
            cache.request.decoding_from = cache.length - first
            self.step(prompt[:, :1], None, None, cache, 1)

    def __str__(self) -> str:
        from .report import runtime_report

        return runtime_report(self)

    def live_caches(self) -> list[SkipCache]:
        """The caches of requests that somebody still holds."""
        return list(self._live)

    # Requests --------------------------------------------------------------------------------

    def new_cache(
        self,
        capacity: int = 0,
        stop_tokens: torch.Tensor | None = None,
        plan: Decision | None = None,
    ) -> SkipCache:
        """An empty cache for a new request.

        Args:
            capacity: tokens to make room for at once; it grows when that is not enough.
            stop_tokens: ids after which a row has ended.
            plan: what the request begins with, if not `self.decision`.
        """
        given = plan if plan is not None else self.decision
        if given is not self._admitted:
            admit(given, self.graphs, type(self.model).__name__)
            self._admitted = given
        request = Request(
            given.plan(self.stage) if isinstance(given, Stages) else given, stop_tokens
        )
        slots, kept = self.graphs.slots, self._kept(request.plan)
        cache = SkipCache(self, slots, kept, self.model.dtype, self.device, capacity)
        cache.request = request
        self.track(cache)
        return cache

    def _kept(self, plan: SkipPlan) -> list[Slot]:
        """What a request of this plan stores of each layer: nothing for what prompts skip."""
        used = set[Memory]()
        for sublayer, memory in self._memory.items():
            if plan.action("prefill", sublayer) is not Action.SKIP:
                used |= memory
        return [
            slot.only({kind for kind in ("attention", "mixer") if (i, kind) in used})
            for i, slot in enumerate(self.graphs.slots)
        ]

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
        request = self._turn(cache, phase)
        inputs = input_ids, attention_mask, position_ids
        if request.undecided:
            request = self._choose(cache, input_ids, attention_mask)
        moments = None
        if phase == "decode":
            plan, probed = request.plan_at(cache.length), request.probed()
            logits, moments = self._run(phase, request, plan, probed, *inputs, cache, 1)
        elif request.plan.last_token_full:
            logits = self._prompt_in_two(phase, request, inputs, cache, logits_to_keep)
        else:
            logits, _ = self._run(phase, request, request.plan, (), *inputs, cache, logits_to_keep)
        cache.request = request  # only now: a step that was refused has changed nothing
        if moments is not None:
            self._learn(request, moments)
        return logits

    def _choose(
        self, cache: SkipCache, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Request:
        """The request with the plan for its first prompt; the cache stores what that plan runs."""
        request: Request = cache.request
        assert isinstance(request.decision, Choice)
        embedding = mean_embedding(self.model, input_ids, attention_mask)
        chosen = request.decision.nearest(embedding.cpu().numpy()).plan
        cache.keep(self._kept(chosen))
        return request.anew(chosen)

    def _prompt_in_two(
        self,
        phase: GraphPhase,
        request: Request,
        inputs: Inputs,
        cache: SkipCache,
        logits_to_keep: int,
    ) -> torch.Tensor:
        """A prompt whose last token runs with the decode plan; logits [B, kept, V] as of one step.

        That token is none of the turn's decoded ones: nothing is measured at it.
        """
        _check_positions(inputs[2], *inputs[0].shape)
        head, tail = cut_last_token(*inputs)
        before, parts = cache.length, list[torch.Tensor]()
        try:
            if head is not None:
                keep = max(1, logits_to_keep - 1) if logits_to_keep else 0
                parts.append(self._run(phase, request, request.plan, (), *head, cache, keep)[0])
            parts.append(self._run("decode", request, request.plan, (), *tail, cache, 1)[0])
        except BaseException:
            if not cache.stateful:  # (a mixer's state cannot be taken back)
                cache.crop(before)
            raise
        return parts[-1] if logits_to_keep == 1 else torch.cat(parts, 1)

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
        _, moments = self._run(
            phase, cache.request, empty, self.sublayers, input_ids, attention_mask, None, cache, 1
        )
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
        if cache.length and input_ids.shape[1] == 1:
            return "decode"
        self.check_length(cache.length + input_ids.shape[1])
        return "extend" if cache.length else "prefill"

    def _turn(self, cache: SkipCache, phase: GraphPhase) -> Request:
        """The request's state for this step; a prompt after decoded tokens begins a new turn."""
        request: Request = cache.request
        if phase != "decode":
            if request.decoding:
                return request.fresh()
            request.fixed.clear()  # parameters may have been replaced since
        elif not request.decoding:
            request.decoding, request.decoding_from = True, cache.length
            if request.decision is request.plan:  # nothing is learned beside a schedule or choice
                request.window = self._new_window(request.plan)
        return request

    def _new_window(self, plan: SkipPlan) -> Window | None:
        """None when nothing can be learned: no policy, or nothing skipped to compare with."""
        if self.policy is None or not self.policy.online or not plan.skipped("prefill"):
            return None
        probed = tuple(s for s in probed_in_decode(plan) if s not in self._unskippable)
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

    @torch.no_grad()
    def _run(
        self,
        phase: GraphPhase,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: SkipCache,
        logits_to_keep: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, tokens = input_ids.shape
        autocast = _autocast(self.device.type)
        if self.fixed_addresses and phase == "decode" and attention_mask is None and not autocast:
            result = self._decode(request, plan, probed, input_ids, position_ids, cache)
            if result is not None:
                return result
        total = cache.length + tokens
        mask, positions = _normal(input_ids, attention_mask, position_ids, cache.length)
        key = GraphKey(
            phase,
            batch,
            one_token=tokens == 1,
            one_stored=total == 1,
            masked=mask is not None,
            logits_to_keep=1 if tokens == 1 else logits_to_keep,
            dtype=self.model.dtype,
            device=self.device,
            autocast=autocast,
        )
        inputs = phases.step_inputs(self.forward, input_ids, positions, mask, key.logits_to_keep)
        arguments = phases.bind_arguments(
            self.model, self.forward, cache.step(batch, tokens, phase == "prefill"), inputs
        )
        program = self.graphs.program(key, plan, probed, arguments)
        fixed = request.fixed.get(program.phase)
        if fixed is None:
            fixed = request.fixed[program.phase] = program.phase.fixed(arguments)
        valid = _valid(request, phase, input_ids, mask) if probed else None
        logits, moments = program(arguments, fixed, valid)
        self._observe(program, plan, batch * tokens)
        cache.advance(tokens)
        cache.padded |= mask is not None
        return logits, moments

    def _decode(
        self,
        request: Request,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: SkipCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """A decode step at fixed addresses; None where the model cannot be captured so."""
        batch = input_ids.shape[0]
        _check_positions(position_ids, batch, 1)
        storage = cache.reserve(batch, 1)
        decoder = storage.decoder
        if decoder is None:
            if self._recorder is None and self.device.type == "cuda":
                self._recorder = Recorder(self.device)
            decoder = storage.decoder = Decoder(
                storage, self.graphs.slots, self.model.dtype, self.device, self._recorder
            )
        lane = request.lane
        if lane is None or not lane.serves(storage, plan, probed, self.counters):
            try:
                lane = request.lane = self._lane(storage, decoder, plan, probed)
            except RefusedError as error:
                self._give_up_fixed_addresses(error)
                return None
        fixed = request.fixed.get(lane.program.phase)
        if fixed is None:
            fixed = request.fixed[lane.program.phase] = lane.program.phase.fixed(lane.arguments)
        valid = request.valid_rows(input_ids) if probed else None
        result = decoder.run(
            lane.program, lane.arguments, fixed, input_ids, position_ids, cache.length, valid
        )
        self._observe(lane.program, plan, batch)
        cache.advance(1)
        return result

    def _observe(self, program: Program, plan: SkipPlan, tokens: int) -> None:
        if self.observer is not None:
            self.observer(program, plan, tokens)

    def _give_up_fixed_addresses(self, error: RefusedError) -> None:
        """Decode on views of the filled cache from now on, as on a CPU; `report` says why."""
        self.fixed_addresses = self.storages.keep = False
        self.why_not_fixed = str(error)
        self.storages.clear()

    def _lane(
        self, storage: Storage, decoder: Decoder, plan: SkipPlan, probed: tuple[Sublayer, ...]
    ) -> Lane:
        key = GraphKey(
            "decode",
            storage.batch,
            one_token=True,
            one_stored=False,
            masked=False,
            logits_to_keep=1,
            dtype=self.model.dtype,
            device=self.device,
            whole_cache=True,
        )
        inputs = phases.step_inputs(self.forward, decoder.tokens, decoder.positions, None, 1)
        arguments = phases.bind_arguments(self.model, self.forward, decoder.cache, inputs)
        program = self.graphs.program(key, plan, probed, arguments)
        return Lane(storage, plan, probed, program, arguments, self.counters.links)

    def _prove(self) -> tuple[Sublayer, ...]:
        """Capture a prefill graph, so that what cannot be skipped is refused at once."""
        device = self.device
        key = GraphKey(
            "prefill",
            batch=1,
            one_token=False,
            one_stored=False,
            masked=False,
            logits_to_keep=1,
            dtype=self.model.dtype,
            device=device,
            autocast=_autocast(device.type),
        )
        return self.graphs.capture(key).sublayers


def _normal(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past: int,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Mask as bool, positions as int64 [B, T], both contiguous: as they were captured."""
    batch, tokens = input_ids.shape
    if position_ids is None:
        position_ids = torch.arange(past, past + tokens, device=input_ids.device).unsqueeze(0)
    _check_positions(position_ids, batch, tokens)
    positions = position_ids.to(torch.int64).expand(batch, tokens).contiguous()
    mask = attention_mask.to(torch.bool).contiguous() if attention_mask is not None else None
    return mask, positions


def _check_positions(position_ids: torch.Tensor | None, batch: int, tokens: int) -> None:
    if position_ids is None:
        return
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}, expected [{batch}, {tokens}]"
        )


def _valid(
    request: Request,
    phase: GraphPhase,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which of the new tokens count for a probe, bool [B, T]."""
    rows = request.valid_rows(input_ids) if phase == "decode" else None
    if rows is not None:
        return rows
    if mask is not None and phase != "decode":
        return mask[:, -input_ids.shape[1] :]
    return torch.ones_like(input_ids, dtype=torch.bool)


def _autocast(device_type: str) -> torch.dtype | None:
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
