"""``fast.adaskip``: what a user asks of a compiled model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kv_cache.cache import SkipCache
from ..plans.decisions import Decision
from ..plans.sublayer import Sublayer
from ..runtime.runtime import Runtime
from ..speculation.statistics import DraftStats

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    from ..policies import OnlinePolicy
    from ..profiles.profile import Profile


@dataclass(frozen=True)
class Stats:
    """What a compiled model has done so far, and what it holds.

    Attributes:
        captures: Graphs traced with Dynamo.
        pieces_compiled: Distinct pieces that were compiled, over all captures.
        compile_seconds: Time spent compiling them.
        links: Programs linked for a plan.
        link_seconds: Time spent linking, pieces that were compiled meanwhile included.
        dropped: Programs that were let go, as there was no room in the memory budget.
        one_batch: Kinds of steps that need a graph for every number of rows above one.
        graphs: Captured graphs that are kept.
        programs: Linked programs that are kept.
        recordings: CUDA graphs that are kept: of those programs, on requests' buffers and on those
            of requests that have ended.
        requests: Requests whose cache somebody still holds.
        cache_bytes: Bytes of K/V and states that they hold, which the memory budget does not count.
        idle_bytes: Bytes of buffers that are kept for later requests; `Handle.free` frees them.
        graph_bytes: Bytes of those graphs, counted by their nodes.
        program_bytes: Bytes of those programs, with the tensors of their surrogates.
        recording_bytes: Bytes of the device that the driver took for those CUDA graphs.
    """

    captures: int
    pieces_compiled: int
    compile_seconds: float
    links: int
    link_seconds: float
    dropped: int
    one_batch: int
    graphs: int
    programs: int
    recordings: int
    requests: int
    cache_bytes: int
    idle_bytes: int
    graph_bytes: int
    program_bytes: int
    recording_bytes: int


class Handle:
    """The controls of one compiled model; ``print`` it to see what it is doing."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        """Control `runtime`."""
        self._runtime = runtime

    @property
    def plan(self) -> Decision:
        """What requests begin with: a plan, a schedule, or a choice by the first prompt.

        Saved, it says which model it is for.

        Of another one that is set, the next request links a program, in milliseconds; running
        requests keep theirs.

        Raises:
            PlanError: (when set) The plan is for another model.
            UnsupportedError: (when set) The plan skips what cannot be skipped.
            ValueError: (when set) The model was compiled with ``decoding=``: its plan only drafts.
        """
        return self._runtime.plan_of_model()

    @plan.setter
    def plan(self, plan: Decision) -> None:
        if self._runtime.speculation is not None:
            raise ValueError(
                "requests of a model that was compiled with decoding= run in full, and its plan "
                "only drafts; compile again with another one (compile(plan=...))"
            )
        self._runtime.set_plan(plan)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers of the model, in stream order."""
        return self._runtime.sublayers

    @property
    def kv_heads(self) -> dict[Sublayer, int]:
        """The K/V heads of each attention sublayer that can have any window."""
        return dict(self._runtime.graphs.structure.kv_heads)

    @property
    def profile(self) -> Profile | None:
        """What calibration measured; None if the model was compiled without."""
        return self._runtime.profile

    @property
    def policy(self) -> OnlinePolicy | None:
        """The policy that learns while decoding; None if nothing is learned."""
        return self._runtime.policy

    @property
    def drafts(self) -> DraftStats | None:
        """What drafts have come to so far; None if the model was compiled without `decoding`."""
        speculation = self._runtime.speculation
        return speculation.stats if speculation is not None else None

    def new_cache(
        self, capacity: int = 0, plan: Decision | None = None, learn: bool = True
    ) -> SkipCache:
        """Return an empty cache, for ``past_key_values=`` (``cache=`` since transformers 5.24).

        Args:
            capacity: How many tokens to make room for at once; it grows when that is not enough.
            plan: What the request begins with, if not `plan`.
            learn: Whether decoding may learn a plan of its own, as the policy says.

        Raises:
            PlanError: The plan is for another model.
            UnsupportedError: The plan skips what cannot be skipped.
        """
        return self._runtime.new_cache(capacity, plan=plan, learn=learn)

    def load_cache(self, path: str | Path, plan: Decision | None = None) -> SkipCache:
        """Return the memory of a request that ``cache.save(path)`` wrote, to go on from it.

        Args:
            path: The file.
            plan: What it was saved under, if not `plan`.

        Raises:
            SavedCacheError: The file is damaged, newer, or of another model or plan.
        """
        return self._runtime.load_cache(path, plan)

    def warmup(self, max_length: int, batch_size: int = 1) -> None:
        """Capture, compile and link what a first request needs, so that it does not wait.

        Args:
            max_length: How many tokens the longest request to come has.
            batch_size: How many rows the requests to come have.

        Raises:
            ValueError: The model has no positions for so many tokens.
        """
        self._runtime.warmup(max_length, batch_size)

    @property
    def memory_budget(self) -> int:
        """Bytes that may be kept for later steps and requests; see `adaskip_fx.compile`.

        Of a smaller number that is set, what was not used for the longest time goes at once.
        What the last step ran on is kept in any case: a warning says if that is more.

        Raises:
            ValueError: (when set) It is no positive number of bytes.
            RanksError: (when set) The model is on several ranks, and they set other numbers.
        """
        return self._runtime.budget.limit

    @memory_budget.setter
    def memory_budget(self, memory_budget: int) -> None:
        self._runtime.ranks.agree("the memory budget", memory_budget)
        self._runtime.budget.limit = memory_budget

    def free(self) -> None:
        """Free the K/V buffers that are kept for later requests, and what was recorded on them.

        There are such buffers on a GPU alone.
        """
        self._runtime.free()

    def stats(self) -> Stats:
        """Return what was captured, compiled and linked so far, and what is held."""
        runtime = self._runtime
        counters = runtime.counters
        graphs, programs, recordings, buffers = runtime.budget.held().values()
        return Stats(
            captures=counters.captures,
            pieces_compiled=runtime.pieces_compiled,
            compile_seconds=runtime.compile_seconds,
            links=counters.links,
            link_seconds=counters.link_seconds,
            dropped=counters.dropped,
            one_batch=counters.one_batch,
            graphs=graphs[0],
            programs=programs[0],
            recordings=recordings[0],
            requests=len(runtime.live_caches()),
            cache_bytes=runtime.cache_bytes,
            idle_bytes=buffers[1],
            graph_bytes=graphs[1],
            program_bytes=programs[1],
            recording_bytes=recordings[1],
        )

    def explain(self) -> str:
        """Return which plan is in force and why, what requests do, and what was compiled."""
        return str(self._runtime)

    __str__ = explain

    def __repr__(self) -> str:
        """Return a line with the plan and the number of requests."""
        return f"<adaskip of {type(self._runtime.model).__name__}, plan {self.plan.digest[:8]}>"


if TYPE_CHECKING:

    class CompiledModel(PreTrainedModel, GenerationMixin):
        """The model's own class with `adaskip` beside its methods, for type checkers."""

        @property
        def adaskip(self) -> Handle:
            """The controls of this compiled model."""
            ...


def runtime_of(model: Any) -> Runtime:
    """Return what a compiled model runs on; it is internal, for tools and tests.

    Raises:
        TypeError: The model was not compiled by `adaskip_fx.compile`.
    """
    runtime = getattr(model, "_adaskip", None)
    if not isinstance(runtime, Runtime):
        raise TypeError(f"{type(model).__name__} is not a model compiled by adaskip_fx")
    return runtime
