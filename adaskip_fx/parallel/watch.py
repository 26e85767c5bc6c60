"""Notice that another rank has failed, or is gone, while this one waits for it.

Whoever waits in a collective waits in torch, where no Python runs. So a thread looks once a second
at the store that the processes met in: each rank counts there, and says in which step it failed.
Then collectives over NCCL are aborted, which wakes up whoever waits for them. Over gloo that cannot
be done: there the process says why and ends. (A killed process closes its connections, so that gloo
raises at once.)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence

import torch.distributed as dist

from ..utils.parallel_internals import abort, store_of_processes
from .errors import RanksError

logger = logging.getLogger(__name__)

_BETWEEN = 1.0  # seconds between two looks
#: Looks after which a rank that does not count any more is gone.
_GONE_AFTER = 20
#: Seconds that a rank has to find by itself what another one has found in the same step.
_GRACE = 8.0
#: Seconds after which a process that was woken up and is still waiting is ended.
_END_AFTER = 6.0
_LEFT = -2  # in place of a step: the rank has ended
#: What errors of gloo and NCCL say that are of the connections between processes.
_LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "gloo", "NCCL")


class Watch:
    """What a rank tells the others of itself, and knows of them."""

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int], rank: int) -> None:
        """Watch over the ranks of `group`, which are `members` of all processes."""
        self._group: dist.ProcessGroup | None = group
        self._rank, self._others = rank, [r for r in range(len(members)) if r != rank]
        self._store = store_of_processes(group, members)
        self._own_steps = 0  # begun by this rank
        self._depth = 0
        self._own_failures: set[int] = set()  # steps
        self._reason: str | None = None
        self._counts: dict[int, tuple[bytes, int]] = {}
        self._seen: dict[int, tuple[int | None, float]] = {}
        self.recovered()  # a store may have what was said in a group that has ended
        self._set("left", "no")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaskip-ranks", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse to go on where a rank has failed or is gone.

        Raises:
            RanksError: it is.
        """
        if self._reason is not None:
            raise RanksError(self._reason)

    def enter(self) -> None:
        """Begin a step; a step within another is a part of it."""
        self.check()
        self._own_steps += self._depth == 0
        self._depth += 1

    def leave(self, error: BaseException | None) -> None:
        """End a step; where it failed, the others are told.

        Raises:
            RanksError: it failed because another rank did, or is gone.
        """
        self._depth -= 1
        if self._depth or isinstance(error, RanksError):
            return
        if error is None:
            self.check()
            return
        cause = self.known(error) if isinstance(error, Exception) else error
        if cause is not error:
            raise cause from error
        self.failed(error)

    def failed(self, error: BaseException) -> None:
        """Tell the others in which step this rank failed, and why."""
        text = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self._own_failures.add(self._own_steps)
        self._set("failed", json.dumps([self._own_steps, text]))

    def recovered(self) -> None:
        """Take it back: all ranks know of the failure by now."""
        self._set("failed", json.dumps([-1, ""]))

    def known(self, error: Exception) -> Exception:
        """Return an error, or what another rank's failure made of it."""
        if isinstance(error, RanksError):
            return error
        if self._reason is not None:
            return RanksError(self._reason)
        return self.explained(error) if _is_of_collectives(error) else error

    def explained(self, error: Exception) -> RanksError:
        """Return why a collective failed, as far as the other ranks have said."""
        for _ in range(10):
            for other in self._others:
                step, text = self._failure(other)
                if step >= self._own_steps:
                    return RanksError(self._failed_text(other, text))
            time.sleep(0.1)
        if self._reason is not None:
            return RanksError(self._reason)
        about = str(error).strip().splitlines()[0].rpartition("] ")[2]
        self._reason = (
            "another rank of this model is gone: it was killed, or has ended "
            f"({about[:120]}); start all ranks again"
        )
        return RanksError(self._reason)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._set("left", "yes")
        if self._thread is not threading.current_thread():
            self._thread.join(3 * _BETWEEN)
        self._group = None

    def _run(self) -> None:
        turn = 0
        while not self._stop.wait(_BETWEEN):
            turn += 1
            self._set("count", str(turn))
            reason = self._reason or self._look()
            if reason is not None:
                self._reason = reason
                self._wake(reason)
                return

    def _look(self) -> str | None:
        """Return why this rank cannot go on; None if it can."""
        for other in self._others:
            step, text = self._failure(other)
            if step >= 0 and self._is_left_alone(other, step):
                return self._failed_text(other, text)
            if self._get("left", other) == b"yes":
                if self._depth and self._lasts(other, _LEFT, _GRACE):
                    return f"rank {other} of this model is gone: it has ended, and this one goes on"
                continue
            count = self._get("count", other)
            before, looks = self._counts.get(other, (b"", 0))
            if count is None:  # it has not begun to count, or there is no store any more
                continue
            self._counts[other] = count, looks + 1 if count == before else 0
            if self._counts[other][1] >= _GONE_AFTER:
                return (
                    f"rank {other} of this model is gone, or has stopped: nothing was heard of it "
                    f"for {_GONE_AFTER * _BETWEEN:.0f} s; start all ranks again"
                )
        return None

    def _is_left_alone(self, other: int, step: int) -> bool:
        """Return whether this rank waits in a step that another has left, or went on after it."""
        if step > self._own_steps or step in self._own_failures:
            return False
        inside = self._depth and step == self._own_steps  # it may yet fail in the same way
        return self._lasts(other, step, _GRACE if inside else 2 * _BETWEEN)

    def _lasts(self, other: int, step: int, seconds: float) -> bool:
        """Return whether a rank has been seen in one state for so long."""
        seen, since = self._seen.get(other, (None, 0.0))
        if seen != step:
            self._seen[other] = step, time.monotonic()
            return False
        return time.monotonic() - since > seconds

    def _wake(self, reason: str) -> None:
        """Have the main thread go on, if it waits for the others."""
        if self._group is None:
            return
        logger.error("%s", reason)
        step = self._own_steps if self._depth else None
        abort(self._group)
        if step is None or self._stop.wait(_END_AFTER):
            return
        if self._depth and self._own_steps == step:
            sys.stderr.write(f"adaskip_fx: RanksError: {reason}\n")
            sys.stderr.flush()
            os._exit(1)

    def _failed_text(self, other: int, text: str) -> str:
        return f"rank {other} of this model failed, and the others cannot go on: {text}"

    def _failure(self, other: int) -> tuple[int, str]:
        said = self._get("failed", other)
        if said is None:
            return -1, ""
        step, text = json.loads(said)
        return int(step), str(text)

    def _set(self, name: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):  # whoever held the store may have ended
            self._store.set(f"{name}/{self._rank}", value)

    def _get(self, name: str, rank: int) -> bytes | None:
        key = f"{name}/{rank}"
        try:
            found: bytes | None = self._store.get(key) if self._store.check([key]) else None
        except RuntimeError:
            return None
        return found


def _is_of_collectives(error: Exception) -> bool:
    """Return whether an error is of the connections between processes."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
