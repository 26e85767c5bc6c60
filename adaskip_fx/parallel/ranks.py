"""The ranks that run one model together, and how they agree.

Ranks that run other plans do not hang, they lie: as many sums of as many numbers, of other layers.
So what a step depends on is compared before it runs, what only one may decide rank 0 decides, and
where one may fail alone all hear of it. All of that goes by way of a control group of its own, over
gloo on the host, and never waits for a GPU.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, WeakMethod

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from adaskip_passes.decode.shared_memory import forget
from adaskip_passes.errors import UnsupportedError

from ..utils.parallel_internals import (
    before_process_groups_end,
    group_of,
    is_sharded,
    parallel_group,
)
from .control_group import ControlGroup
from .errors import RanksError
from .watch import Watch

T = TypeVar("T")
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

_LONGEST_TEXT = 120

#: What is done with a model's ranks before its process group ends.
Release: TypeAlias = Callable[[], None]

_known: WeakKeyDictionary[dist.ProcessGroup, Ranks] = WeakKeyDictionary()


class Ranks:
    """The processes that run one model together; what a process does alone where it is the only.

    Attributes:
        rank: which of them this one is, from 0 on.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Make the control group of `group`'s ranks, each of which does so; None: one process."""
        self.rank, self.size = 0, 1
        self._control: ControlGroup | None = None
        self._watch: Watch | None = None
        self._releases: list[WeakMethod[Release]] = []
        self._group: dist.ProcessGroup | None = None
        if group is None or dist.get_world_size(group) == 1:
            return
        members = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(members)
        self._group, self._first = group, members[0]
        self._watch = Watch(group, members, self.rank)
        self._control = ControlGroup(members, self._watch)

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Return those of a model, made once for a process group."""
        group = parallel_group(model)
        return cls() if group is None else cls.of_group(group)

    @classmethod
    def holding(cls, tensors: Iterable[Any]) -> Ranks:
        """Return those that the sharded ones among some tensors are spread over."""
        sharded = (t for t in tensors if is_sharded(t))
        mesh = next((t.device_mesh for t in sharded), None)
        return cls() if mesh is None else cls.of_group(group_of(mesh))

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> Ranks:
        """Return those of a process group, made once."""
        if group not in _known:
            before_process_groups_end(_close_all)
            _known[group] = cls(group)
        return _known[group]

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    def refuse(self, what: str, instead: str) -> None:
        """Refuse what a model on several ranks cannot do.

        Raises:
            UnsupportedError: it is on several.
        """
        if not self.alone:
            raise UnsupportedError(
                f"{what} is not supported where a model is on several ranks; {instead}"
            )

    def agree(self, what: str, value: object) -> None:
        """Compare what ranks are about to use; `value` is compared by its text.

        Raises:
            RanksError: on every rank, where it is not the same on all; or a rank failed.
        """
        if self.alone:
            return
        text = str(value)
        told = hashlib.sha256(text.encode()).hexdigest(), text[:_LONGEST_TEXT]
        of_all: list[tuple[str, str]] = self._gather(what, told)
        if len(dict(of_all)) > 1:
            each = ", ".join(f"{text} on rank {r}" for r, (_, text) in enumerate(of_all))
            raise RanksError(
                f"ranks do not agree on {what}: {each}; give every rank the same model, profile, "
                "plan, alpha and inputs, of the same files"
            )

    def first(self, what: str, make: Callable[[], T]) -> T:
        """Return what `make` gives on rank 0; it is called nowhere else.

        Raises:
            Exception: on every rank, what it raised on rank 0.
        """
        if self.alone:
            return make()
        made = _tried(make) if self.rank == 0 else None
        results: Sequence[Any] = self._gather(what, made)
        return _result(results[0])  # type: ignore[no-any-return]

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of rank 0 in a tensor that all ranks have, of one shape, in place.

        They come over the model's own process group, in the order of the device's work, and no host
        waits for them.
        """
        if self._group is None:
            return tensor
        tensor = tensor.contiguous()
        with self.step():
            dist.broadcast(tensor, self._first, group=self._group)
        return tensor

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks of a tensor, in place; it comes as in `of_first`."""
        if self._group is not None:
            with self.step():
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def each(self, what: str, work: Callable[[], T]) -> list[T]:
        """Return what `work` gives on each rank; nobody waits for another one in it.

        Raises:
            Exception: on every rank, what the first of those raised in which it failed.
        """
        if self.alone:
            return [work()]
        of_all: list[Any] = self._gather(what, _tried(work))
        return [_result(tried) for tried in of_all]

    def apart(self, what: str, work: Callable[[], T]) -> T:
        """Return what `work` gives on this rank, if it was done on all; as `each`."""
        own: list[T] = []
        self.each(what, lambda: own.append(work()))
        return own[0]

    def together(self, what: str, work: Callable[[], T]) -> T:
        """Return what `work` gives on this rank, if it was done on all of them.

        Raises:
            Exception: on every rank, what the first of those raised in which it failed.
        """
        watch = self._watch
        if watch is None:
            return work()
        failed: Exception | None = None
        with self.step():
            try:
                result = work()
            except Exception as error:
                failed = watch.known(error)
                watch.failed(failed)  # for those that still wait for this rank in their work
            verdicts = [e for e in self._gather(what, failed and portable(failed)) if e is not None]
            if failed is not None:
                watch.recovered()
        if not verdicts:
            return result
        if failed is not None and type(failed) is type(verdicts[0]):
            raise failed
        raise verdicts[0] from failed

    def every(self, what: str, holds: bool) -> bool:
        """Return whether something holds on all ranks."""
        return holds if self.alone else all(self._gather(what, holds))

    def sums(self, what: str, arrays: Mapping[str, Integers]) -> dict[str, Integers]:
        """Return the sums over all ranks of arrays of integers, by name."""
        if self.alone:
            return dict(arrays)
        of_all: list[Mapping[str, Integers]] = self._gather(what, dict(arrays))
        return {name: sum(of[name] for of in of_all) for name in arrays}  # type: ignore[misc]

    def step(self) -> Step:
        """Return the context of a step, in which ranks wait for one another on their devices."""
        return Step(self._watch)

    def check(self) -> None:
        """Refuse to go on where a rank has failed or is gone.

        Raises:
            RanksError: it is.
        """
        if self._watch is not None:
            self._watch.check()

    def at_end(self, release: Release) -> None:
        """Call a method before the process group ends, if its object is still there.

        It frees what holds on to the group: NCCL waits for CUDA graphs with collectives in them.
        """
        if not self.alone:
            self._releases = [r for r in self._releases if r() is not None]
            self._releases.append(WeakMethod(release))

    def close(self) -> None:
        """Free what holds on to the process group, which is about to end, and stop watching."""
        for known in self._releases:
            release = known()
            if release is not None:
                release()
        self._releases.clear()
        if self._watch is not None:
            self._watch.close()
        self._control = self._group = None

    def _gather(self, what: str, value: object) -> list[Any]:
        if self._control is None:
            raise RanksError("the process group of this model has been destroyed")
        return self._control.gather(what, value)


def _close_all() -> None:
    for ranks in list(_known.values()):
        ranks.close()
    _known.clear()
    forget()


class Step:
    """A step on all ranks: one that fails alone is told to the others, which would wait for it."""

    def __init__(self, watch: Watch | None) -> None:
        """Watch over a step; nothing is to be done in one process."""
        self._watch = watch

    def __enter__(self) -> None:
        """Refuse to begin where a rank is gone."""
        if self._watch is not None:
            self._watch.enter()

    def __exit__(self, kind: Any, error: BaseException | None, _traceback: Any) -> None:
        """Tell the others that this rank has failed; or say which other did."""
        if self._watch is not None:
            self._watch.leave(error)


def _tried(make: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, make()
    except Exception as error:
        return False, portable(error)


def _result(tried: tuple[bool, Any]) -> Any:
    done, value = tried
    if not done:
        raise value
    return value


def portable(error: Exception) -> Exception:
    """Return an error that can be sent; one that cannot is told in words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RanksError(f"{type(error).__name__}: {error}")
    return error
