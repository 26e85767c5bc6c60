"""Steps on a static cache: one program after the other on one request's buffers.

A step has one token of each row (decoding), or a few (drafts to be verified). Its inputs and
outputs are buffers that stay, so it needs nothing from the host but the tokens, and on CUDA it is
recorded once as a graph and then replayed. A piece that runs for the first time sets up what its
kernels need, which cannot be recorded: the first step with a program that calls such a piece runs
kernel by kernel, and is recorded right after. A plan that is linked from pieces that have run is
recorded at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from adaskip_passes import Recorder, Recording

from ..capture.graph_key import Surroundings
from ..kv_cache.buffers import CacheBuffers
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.padding import Padding
from ..kv_cache.views import StaticCacheView
from ..plans.skip_plan import SkipPlan, Sublayer
from ..programs.program import Program
from ..utils.memory_budget import MemoryBudget
from .static_inputs import StaticInputs


@dataclass(frozen=True)
class StaticBinding:
    """What the static steps of a request repeat, so that it is looked up once.

    It holds the program, which a device may still be running, also when that is not kept any more.
    """

    buffers: CacheBuffers
    plan: SkipPlan
    probed: tuple[Sublayer, ...]
    surroundings: Surroundings
    program: Program
    arguments: dict[str, Any]

    def serves(
        self,
        buffers: CacheBuffers,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        surroundings: Surroundings,
    ) -> bool:
        """Whether the next step is like the last one."""
        return (
            self.buffers is buffers
            and self.plan is plan
            and self.probed == probed
            and self.surroundings == surroundings
        )


@dataclass(eq=False)
class Recorded:
    """A program's step as a graph, and the weights it was recorded with."""

    graph: Recording
    weights: tuple[Any, ...]
    addresses: tuple[int, ...]

    def parts(self) -> dict[int, int]:
        """Return its bytes by identity, for the budget."""
        return {id(self): self.graph.nbytes}


class StaticStep:
    """The steps of one buffers that have the same number of new tokens.

    Attributes:
        inputs: what a step is handed.
        cache: what a captured step sees of the buffers.
    """

    def __init__(
        self,
        buffers: CacheBuffers,
        specs: Sequence[LayerCacheSpec],
        tokens: int,
        device: torch.device,
        recorder: Recorder | None,
        budget: MemoryBudget,
    ) -> None:
        """Make the inputs of steps of `tokens` new tokens a row."""
        self.inputs = inputs = StaticInputs(buffers.batch, tokens, device)
        where = inputs.position, inputs.first
        self.cache = StaticCacheView.of(buffers, specs, *where, buffers.whole)
        self._recorder, self._budget = recorder, budget
        self._recordings: weakref.WeakKeyDictionary[Program, Recorded] = weakref.WeakKeyDictionary()
        self._ran: set[Callable[..., Any]] = set()  # pieces, with the weights that are at
        self._ran_with: tuple[int, ...] = ()  # these addresses
        self._logits: torch.Tensor | None = None
        self._statistics: dict[int, torch.Tensor] = {}  # by how many sublayers are probed

    @property
    def has_run(self) -> bool:
        """Whether there has been a step."""
        return self._logits is not None

    def use_here(self) -> None:
        """Have the step's tensors for as long as the caller's CUDA stream works on them as well."""
        _use_here([*self.inputs.all(), *self._outputs()])

    def _outputs(self) -> list[torch.Tensor]:
        return [*self._statistics.values(), *([] if self._logits is None else [self._logits])]

    def run(
        self,
        program: Program,
        arguments: dict[str, Any],
        weights: tuple[Any, ...],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        length: int,
        padding: Padding | None,
        valid: torch.Tensor | None,
        own: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step; returns logits [B, T, V] and the statistics [probed, B, 5] of what is probed.

        Args:
            program: linked for a step on a static cache.
            arguments: of the captured function: this decoder's buffers.
            weights: the weights.
            input_ids: int64 [B, T], or fewer: what comes after them is anything, and so are its
                logits.
            position_ids: [B or 1, T] or fewer; None for the tokens after the last.
            length: tokens stored before these.
            padding: of the rows; None where there is none.
            valid: which rows count for the probes, bool [B, 1]; None: all.
            own: whether the logits are the caller's; else the next step overwrites them.
        """
        inputs = self.inputs
        inputs.write(input_ids, position_ids, length, padding, valid)
        self._run(program, arguments, weights)
        tokens = inputs.tokens.shape[1]
        inputs.counted(length + tokens, position_ids is None and input_ids.shape[1] == tokens)
        assert self._logits is not None
        statistics = self._statistics[len(program.probed)].clone() if program.probed else None
        return self._logits.clone() if own else self._logits, statistics

    def let_go(self) -> None:
        """Free the graphs, when what they launched is through; the next steps record others."""
        if self._recordings:
            torch.cuda.synchronize(self.inputs.tokens.device)
        for recording in self._recordings.values():
            recording.graph.graph.reset()
        self._recordings.clear()

    def forget(self, recording: Recorded) -> None:
        """Forget one graph; a driver frees it when what it launched is through."""
        for program, kept in list(self._recordings.items()):
            if kept is recording:
                self._recordings.pop(program, None)

    def _run(self, program: Program, arguments: dict[str, Any], weights: tuple[Any, ...]) -> None:
        def body() -> None:
            self._keep(*program(arguments, weights, self.inputs.valid))
            self.inputs.count()

        if self._recorder is None:
            body()
            return
        recording = self._recordings.get(program)
        if recording is not None and _same(recording, weights):
            self._budget.use(recording)
            self._recorder.replay(recording.graph)
            return
        addresses = _addresses(weights)
        if addresses != self._ran_with:
            self._ran.clear()
            self._ran_with = addresses
        ready = self._ready(program)
        if not ready:
            self._recorder.run(body)
            self._ran |= program.functions
            _use_here(self._outputs())  # made on another stream
        recording = Recorded(self._recorder.record(body), weights, addresses)
        self._recordings[program] = recording
        self._budget.keep(recording, "recordings", partial(_let_go, weakref.ref(self)))
        if ready:
            self._recorder.replay(recording.graph)

    def _ready(self, program: Program) -> bool:
        """Whether a step has nothing left to set up: its pieces have run, its outputs have room."""
        room = self._logits is not None and (
            not program.probed or len(program.probed) in self._statistics
        )
        return room and program.functions <= self._ran

    def _keep(self, logits: torch.Tensor, statistics: torch.Tensor | None) -> None:
        """Copy a step's outputs to the buffers that all programs share."""
        self._logits = _kept(self._logits, logits)
        if statistics is not None:
            probed = statistics.shape[0]
            self._statistics[probed] = _kept(self._statistics.get(probed), statistics)


def _use_here(tensors: Sequence[torch.Tensor]) -> None:
    """Have tensors for as long as the caller's CUDA stream works on them."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _kept(buffer: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    if buffer is None:
        with torch.inference_mode(False):
            buffer = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return buffer.copy_(value)


def _same(recording: Recorded, weights: tuple[Any, ...]) -> bool:
    """Whether a graph was recorded with these weights; they are looked up once a request."""
    if recording.weights is weights:
        return True
    if recording.addresses != _addresses(weights):
        return False
    recording.weights = weights
    return True


def _addresses(weights: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(v.data_ptr() if isinstance(v, torch.Tensor) else hash(v) for v in weights)


def _let_go(step: weakref.ref[StaticStep], recording: Recorded) -> None:
    """Have a step forget one of its graphs; what it launched runs to its end."""
    steps = step()
    if steps is not None:
        steps.forget(recording)
