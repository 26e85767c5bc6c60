"""The requests of a model that ``torch.compile`` runs, each known by the tensors of its cache."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..plans.decisions import Schedule, plans_of
from ..plans.skip_plan import SkipPlan
from ..runtime.window import DecodePlans, Learner


@dataclass
class BackendRequest:
    """How far one request is.

    Attributes:
        decision: What it began with.
        learner: What decoding learns with; None for nothing.
        decode: The plans of its decode steps.
        decoded: How many decode steps it has made.
    """

    decision: SkipPlan | Schedule
    learner: Learner | None = None
    decode: DecodePlans = field(init=False)
    decoded: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.decode = DecodePlans(self.decision)
        self.decode.learn_with(self.learner)

    @property
    def plan(self) -> SkipPlan:
        """The plan that it began with."""
        return plans_of(self.decision)[0]

    @property
    def remembers(self) -> bool:
        """Whether it matters for a step what its request did before, or that it is a prompt."""
        changes = isinstance(self.decision, Schedule) or self.decode.window is not None
        return changes or not self.plan.phases_alike

    def next_plan(self) -> SkipPlan:
        """Return the plan of the next decode step, which is counted."""
        self.decoded += 1
        return self.decode.at(self.decoded - 1)

    def begun(self) -> BackendRequest:
        """Return a new request with the same decision."""
        return BackendRequest(self.decision, self.learner) if self.remembers else self


@dataclass
class Requests:
    """The requests of one compiled model.

    Every tensor counts the writes to it. A request goes on if nobody has written to its cache since
    its last step. If somebody has (a reset, a prefill that ran elsewhere, another model), or the
    cache is not known, a new one begins. Tensors made under ``torch.inference_mode`` do not count;
    of these a hash of the content is taken, before and after every step, for which the host waits.

    Attributes:
        first: What every request is at its beginning.
        options: They are kept, so that nothing else can take the identity of a part of them.
        known: For each tensor of a cache its request, and its mark after the request's last step.
            A cache that is freed takes them along.
    """

    first: BackendRequest
    options: dict[str, Any]
    known: MutableMapping[torch.Tensor, tuple[BackendRequest, int]] = field(
        default_factory=WeakIdKeyDictionary
    )

    def going_on(self, cache: Sequence[torch.Tensor]) -> BackendRequest | None:
        """Return the request that was the last to write to this cache; None if there is none."""
        if not self.first.remembers:
            return self.first
        found = [(t, *self.known[t]) for t in cache if t in self.known]
        if not found or any(mark != _mark(t) for t, _, mark in found):
            return None
        requests = {id(request): request for _, request, _ in found}
        return next(iter(requests.values())) if len(requests) == 1 else None

    def keep(self, cache: Sequence[torch.Tensor], request: BackendRequest) -> None:
        """Remember that a step of `request` has just written to this cache."""
        if self.first.remembers:
            for tensor in cache:
                self.known[tensor] = request, _mark(tensor)


def _mark(tensor: torch.Tensor) -> int:
    """What changes when somebody writes to it."""
    if tensor.is_inference():
        return int(torch.hash_tensor(tensor).view(torch.int64))  # from 64 bits without a sign
    return tensor._version


def is_empty(cache: Sequence[torch.Tensor]) -> bool:
    """Return whether nothing is stored; the host waits for the device.

    Empty caches, and those that were reset, hold zeros.
    """
    return not any(bool(t.any()) for t in sorted(cache, key=torch.Tensor.numel))
