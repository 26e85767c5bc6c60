"""Processes of which each has a whole model, or the same part of one: they share texts out.

What a text gives comes from one of them, and all of them get it, in the order of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..utils.parallel_internals import parallel_group
from .ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

#: Whether processes share texts; which do, where they are not all that there are.
DataParallel: TypeAlias = "bool | ProcessGroup"


class Replicas:
    """The processes that share texts out; one alone does all of them.

    Attributes:
        ranks: they, and how they agree.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """Meet the others of `group`, each of which does so; None: one process alone."""
        self.ranks = Ranks() if group is None else Ranks.of_group(group)
        self._group = group

    def check_model(self, *facts: object) -> None:
        """Compare what identifies the models that processes have.

        Raises:
            RanksError: they are not the same.
        """
        self.ranks.agree("the model that each has", facts)

    def share(
        self,
        what: str,
        sizes: Sequence[int],
        work: Callable[[int], T],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[T]:
        """Return on all processes what `work` gives for each index of `sizes`, done by one of them.

        Each does one in turn, the largest first, so that those of a turn take about as long. A
        failure is heard of after the turn.

        Args:
            what: is done.
            sizes: of the work at each index.
            work: called on one of the processes for each index; what it returns can be pickled.
            progress: called on the first process with (indices done, indices in all).

        Raises:
            Exception: on every process, what the first of those raised in which `work` failed.
        """
        ranks = self.ranks
        order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        results: dict[int, T] = {}
        for start in range(0, len(order), ranks.size):
            turn = order[start : start + ranks.size]
            own = turn[ranks.rank : ranks.rank + 1]
            of_all = ranks.each(what, partial(_done, work, own))
            results.update(zip(turn, (result for done in of_all for result in done), strict=True))
            if progress is not None and ranks.rank == 0:
                progress(len(results), len(sizes))
        return [results[index] for index in range(len(sizes))]

    def add_up(self, what: str, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place, over their own group.

        Raises:
            RanksError: a process is gone.
        """
        if self._group is None:
            return
        self.ranks.agree(what, [(tuple(t.shape), t.dtype) for t in tensors])
        with self.ranks.step():
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)


def replicas_of(model: nn.Module, data_parallel: DataParallel) -> Replicas:
    """Return the processes that share texts out with this one.

    Args:
        model: that each of them has.
        data_parallel: False: this one alone. True: all that there are. Or a process group of those
            that hold the same part of a model which is spread over others.

    Raises:
        ValueError: processes have not met, or this one is not in the group, or others of the group
            hold other parts of the same model.
    """
    if data_parallel is False:
        return Replicas()
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "data_parallel shares texts among the processes of torch.distributed, which have not "
            "met: start them with torchrun, and call torch.distributed.init_process_group() first"
        )
    group = dist.group.WORLD if data_parallel is True else data_parallel
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group that data_parallel names")
    own = parallel_group(model)
    if own is not None:
        together = {*dist.get_process_group_ranks(own)} & {*dist.get_process_group_ranks(group)}
        if len(together) > 1:
            raise ValueError(
                "the model is itself spread over processes that data_parallel would share texts "
                f"among ({', '.join(map(str, sorted(together)))}): leave it out, or give the "
                "process group of those that hold the same part of it"
            )
    return Replicas(group)


def _done(work: Callable[[int], T], indices: Sequence[int]) -> list[T]:
    return [work(index) for index in indices]
