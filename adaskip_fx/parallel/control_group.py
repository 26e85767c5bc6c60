"""Small messages between ranks: a process group of its own, over gloo on the host.

It never waits for a GPU, and whoever waits in it looks meanwhile whether a rank has failed.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import RanksError
from .watch import Watch

#: Seconds after which a rank that is alive, and does not come to where the others are, is an error.
_LIMIT = float(os.environ.get("ADASKIP_RANKS_TIMEOUT", "1800"))
#: Bytes of a first message; a longer one is announced in it and follows.
_FIRST = 1024
_LENGTH = 8  # bytes that say how long a message is
_LONGEST_NAP = 0.02


class ControlGroup:
    """The control group of some processes, each of which makes it."""

    def __init__(self, members: Sequence[int], watch: Watch) -> None:
        """Meet the others.

        Args:
            members: which of all processes they are.
            watch: knows whether one of them has failed.
        """
        self._watch, self._size = watch, len(members)
        self._group = dist.new_group(
            list(members),
            backend="gloo",
            timeout=timedelta(seconds=_LIMIT),
            use_local_synchronization=True,
        )

    def gather(self, what: str, value: object) -> list[Any]:
        """Return the values of all ranks, in order; each can be pickled.

        Raises:
            RanksError: they are not all at `what`; or one has failed, or does not come.
        """
        data = pickle.dumps((what, value))
        messages = self._exchange(what, _padded(data, _FIRST))
        longest = max(map(_length, messages))
        if longest > _FIRST - _LENGTH:
            messages = self._exchange(what, _padded(data, longest + _LENGTH))
        found = [pickle.loads(m[_LENGTH : _LENGTH + _length(m)]) for m in messages]
        if len({where for where, _ in found}) > 1:
            each = ", ".join(f"rank {r} at {where}" for r, (where, _) in enumerate(found))
            raise RanksError(f"ranks are not at the same place: {each}; make the same calls on all")
        return [value for _, value in found]

    def _exchange(self, what: str, data: bytes) -> list[bytes]:
        """Return the equally long messages of all ranks."""
        self._watch.check()
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        all_of_them = [torch.empty_like(mine, device="cpu") for _ in range(self._size)]
        try:
            work = dist.all_gather(all_of_them, mine, group=self._group, async_op=True)
            self._wait(what, work)
        except RanksError:
            raise
        except RuntimeError as error:  # of gloo: a connection was closed
            raise self._watch.explained(error) from error
        return [bytes(t.numpy()) for t in all_of_them]

    def _wait(self, what: str, work: Any) -> None:
        nap, until = 1e-5, time.monotonic() + _LIMIT
        while not work.is_completed():
            self._watch.check()
            if time.monotonic() > until:
                raise RanksError(
                    f"another rank of this model did not come to {what} within {_LIMIT:.0f} s; "
                    "make the same calls on all (ADASKIP_RANKS_TIMEOUT sets the limit)"
                )
            time.sleep(nap)
            nap = min(nap * 1.5, _LONGEST_NAP)
        work.wait()


def _padded(data: bytes, size: int) -> bytes:
    """Return a message of `size` bytes: its length, and as much of it as there is room for."""
    room = size - _LENGTH
    return len(data).to_bytes(_LENGTH, "little") + data[:room].ljust(room, b"\0")


def _length(message: bytes) -> int:
    return int.from_bytes(message[:_LENGTH], "little")
