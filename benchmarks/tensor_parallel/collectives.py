"""What the sums over ranks take by themselves: of a step in a CUDA graph, of a prompt as it is.

A step's are those of `adaskip::sum_over_ranks`, a prompt's the process group's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.utils.parallel_internals import parallel_group

from . import processes

if TYPE_CHECKING:
    from .subject import Subject

_TOGETHER = 64  # in one recording, so that its launch does not count


class Collectives:
    """The collectives of one model: sums of what runs, and a gathering of the logits."""

    def __init__(self, subject: Subject) -> None:
        """Measure for `subject`, at the first question."""
        self._subject = subject
        self._known: dict[tuple[str, int], float] = {}

    def of_step(self, plan: SkipPlan) -> float:
        """Return the seconds of a step's collectives."""
        runs = sum(plan.action("decode", s) is Action.RUN for s in plan.sublayers)
        return (runs + self._of_embeddings) * self._sum(1) + self._gather()

    def of_prompt(self, plan: SkipPlan, tokens: int) -> float:
        """Return the seconds of a prompt's collectives."""
        runs = sum(plan.action("prefill", s) is Action.RUN for s in plan.sublayers)
        return (runs + self._of_embeddings) * self._sum(tokens) + self._gather()

    @property
    def _of_embeddings(self) -> bool:
        """Whether there is a sum of the embeddings: newer transformers shard them."""
        return hasattr(self._subject.model.get_input_embeddings().weight, "device_mesh")

    def of_group(self) -> tuple[float, float]:
        """Return the seconds of a step's sum, and of the same by the process group alone."""
        return self._sum(1), self._of("all-reduce", 1, lambda: dist.all_reduce(self._values(1)))

    def _sum(self, tokens: int) -> float:
        """Return the seconds of one sum of [1, tokens, hidden]."""
        values = self._values(tokens)
        group = parallel_group(self._subject.fast.model)
        if tokens > 1 or group is None:
            return self._of("sum", tokens, lambda: dist.all_reduce(values))
        name = group.group_name
        return self._of("sum", 1, lambda: torch.ops.adaskip.sum_over_ranks(values, None, name))

    def _values(self, tokens: int) -> torch.Tensor:
        size = 1, tokens, self._subject.model.config.hidden_size
        return torch.zeros(size, dtype=self._dtype, device=self._subject.device)

    def _gather(self) -> float:
        """Return the seconds of one gathering of the logits of a token."""
        share = self._subject.model.config.vocab_size // processes.count()
        mine = torch.zeros(share, dtype=self._dtype, device=self._subject.device)
        whole = mine.new_empty(share * processes.count())

        def run() -> None:
            dist.all_gather_into_tensor(whole, mine)

        return self._of("gather", 1, run)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._subject.model.dtype
        return dtype

    def _of(self, name: str, tokens: int, run: Callable[[], Any]) -> float:
        if processes.count() == 1:
            return 0.0
        key = name, tokens
        if key not in self._known:
            self._known[key] = self._measured(run, recorded=tokens == 1)
        return self._known[key]

    def _measured(self, run: Callable[[], Any], recorded: bool) -> float:
        rounds = self._subject.sizes.rounds
        if not recorded or self._subject.device.type != "cuda":
            return processes.seconds(run, rounds)
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_TOGETHER):
                run()
        took = processes.seconds(graph.replay, rounds) / _TOGETHER
        graph.reset()  # NCCL waits for it at the end
        return took
