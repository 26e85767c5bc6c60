"""Decode steps on a static cache: one program after the other on one request's buffers.

Token, position and outputs are buffers that stay; the position is counted on the device. So a
step needs nothing from the host but the token, and on CUDA it is recorded once as a graph and then
replayed. A piece that runs for the first time sets up what its kernels need, which cannot be
recorded: the first step with a program that calls such a piece runs kernel by kernel, and is
recorded right after. A plan that is linked from pieces that have run is recorded at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_passes import Recorder

from ..capture.graph_key import Surroundings
from ..kv_cache.buffers import CacheBuffers
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.views import StaticCacheView
from ..plans.skip_plan import SkipPlan, Sublayer
from ..programs.program import Program
from ..programs.variants import Counters


@dataclass(frozen=True)
class DecodeBinding:
    """What the decode steps of a request repeat, so that it is looked up once.

    links: of the counters when it was looked up: linking another program may drop this one.
    """

    buffers: CacheBuffers
    plan: SkipPlan
    probed: tuple[Sublayer, ...]
    surroundings: Surroundings
    program: Program
    arguments: dict[str, Any]
    links: int

    def serves(
        self,
        buffers: CacheBuffers,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        surroundings: Surroundings,
        counters: Counters,
    ) -> bool:
        """Whether the next step is like the last one."""
        return (
            self.buffers is buffers
            and self.plan is plan
            and self.probed == probed
            and self.surroundings == surroundings
            and self.links == counters.links
        )


@dataclass(eq=False)
class _Recording:
    """A program's step as a graph, and the weights it was recorded with."""

    graph: torch.cuda.CUDAGraph
    weights: tuple[Any, ...]
    addresses: tuple[int, ...]


class StaticDecodeStep:
    """The decode steps of one buffers.

    Attributes:
        cache: what a captured step sees of the buffers.
        tokens, positions: inputs of a step, int64 [B, 1].
        valid: which rows count for the probes, bool [B, 1].
    """

    def __init__(
        self,
        buffers: CacheBuffers,
        specs: Sequence[LayerCacheSpec],
        dtype: torch.dtype,
        device: torch.device,
        recorder: Recorder | None,
    ) -> None:
        batch = buffers.batch
        with torch.inference_mode(False):
            self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self.valid = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.cache = StaticCacheView.of(buffers, specs, self.position, dtype)
        self._recorder = recorder
        self._recordings: weakref.WeakKeyDictionary[Program, _Recording] = (
            weakref.WeakKeyDictionary()
        )
        self._position_at: int | None = None  # what `position` holds, if that is known
        self._positions_at: int | None = None  # likewise `positions`
        self._all_valid = True  # what `valid` holds
        self._ran: set[Callable[..., Any]] = set()  # pieces, with the weights that are at
        self._ran_with: tuple[int, ...] = ()  # these addresses
        self._logits: torch.Tensor | None = None
        self._statistics: dict[int, torch.Tensor] = {}  # by how many sublayers are probed

    def run(
        self,
        program: Program,
        arguments: dict[str, Any],
        weights: tuple[Any, ...],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        length: int,
        valid: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step; returns logits [B, 1, V] and the statistics [probed, B, 5] of what is probed.

        Args:
            program: linked for a step on a static cache.
            arguments: of the captured function: this decoder's buffers.
            weights: the weights.
            input_ids: int64 [B, 1].
            position_ids: [B or 1, 1]; None for the token after the last.
            length: tokens stored before this one.
            valid: which rows count for the probes, bool [B, 1]; None: all.
        """
        self._write(input_ids, position_ids, length, valid)
        self._position_at = self._positions_at = None  # until the step is through
        self._run(program, arguments, weights)
        self._position_at = length + 1
        self._positions_at = length + 1 if position_ids is None else None
        assert self._logits is not None
        statistics = self._statistics[len(program.probed)].clone() if program.probed else None
        return self._logits.clone(), statistics

    def _write(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        length: int,
        valid: torch.Tensor | None,
    ) -> None:
        self.tokens.copy_(input_ids)
        if self._position_at != length:
            self.position.fill_(length)
        if position_ids is not None:
            self.positions.copy_(position_ids)
        elif self._positions_at != length:
            self.positions.fill_(length)
        if valid is not None:
            self.valid.copy_(valid)
            self._all_valid = False
        elif not self._all_valid:
            self.valid.fill_(True)
            self._all_valid = True

    def _run(self, program: Program, arguments: dict[str, Any], weights: tuple[Any, ...]) -> None:
        def body() -> None:
            self._keep(*program(arguments, weights, self.valid))
            self.position.add_(1)
            self.positions.add_(1)

        if self._recorder is None:
            body()
            return
        recording = self._recordings.get(program)
        if recording is not None and _same(recording, weights):
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
        graph = self._recorder.record(body)
        self._recordings[program] = _Recording(graph, weights, addresses)
        if ready:
            self._recorder.replay(graph)

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


def _kept(buffer: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    if buffer is None:
        with torch.inference_mode(False):
            buffer = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return buffer.copy_(value)


def _same(recording: _Recording, weights: tuple[Any, ...]) -> bool:
    """Whether a graph was recorded with these weights; they are looked up once a request."""
    if recording.weights is weights:
        return True
    if recording.addresses != _addresses(weights):
        return False
    recording.weights = weights
    return True


def _addresses(weights: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(v.data_ptr() if isinstance(v, torch.Tensor) else hash(v) for v in weights)
