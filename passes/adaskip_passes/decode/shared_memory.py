"""Memory that the ranks of one machine write into each other's, for sums over them.

It is PyTorch's symmetric memory, mapped by all ranks of a group over NVLink or PCIe. Where it
cannot be had (other machines, no peer access, another backend) there is none, on every rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _torch
from .rank_sums import MOST_NUMBERS

logger = logging.getLogger(__name__)

PROGRAMS = 256  # that a sum has at most
_NUMBER_BYTES = 4  # of the widest dtype
_MOST_RANKS = 8  # each writes to all others


@dataclass(frozen=True, eq=False)
class Shared:
    """What a rank's sums write to, and where they read.

    Attributes:
        rank: Which rank this one is.
        addresses: Of the memory of each rank, int64 [ranks], on the device.
        turns: How many sums each program has begun, int32 [`PROGRAMS`], on the device.
        stop: int32 [1], in the host's memory, where a device can read it: not 0, and who waits for
            another rank goes on with what there is.
        bytes: Of a rank's part of a sum.
        held: What the memory lives by.

    """

    rank: int
    addresses: torch.Tensor
    turns: torch.Tensor
    stop: torch.Tensor
    bytes: int = MOST_NUMBERS * _NUMBER_BYTES
    held: Any = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.addresses.numel()

    @staticmethod
    def nbytes(ranks: int) -> int:
        """Return the bytes of memory that each rank has."""
        return ranks * PROGRAMS * 4 + 2 * ranks * MOST_NUMBERS * _NUMBER_BYTES


_of_groups: dict[str, Shared | None] = {}


def shared_memory(group: str, device: torch.device) -> Shared | None:
    """Return a group's memory, made by all ranks at their first question; None if there is none.

    It is not made while a graph is recorded.

    Args:
        group: Name of the process group.
        device: Of this rank.

    """
    if group not in _of_groups:
        if torch.cuda.is_current_stream_capturing():
            return None
        _of_groups[group] = _made(group, device)
    return _of_groups[group]


def _made(group: str, device: torch.device) -> Shared | None:
    ranks = _torch.ranks_of(group)
    if not 1 < ranks <= _MOST_RANKS:
        return None
    made: tuple[Any, int, list[int]] | None = None
    try:
        made = _torch.symmetric_memory(Shared.nbytes(ranks), device, group)
    except Exception as error:  # what a driver, a container or a group lacks has many names
        logger.info("sums over ranks are the process group's: %s", (str(error) or repr(error)))
    have = torch.tensor([made is not None], dtype=torch.float32, device=device)
    if int(_torch.all_reduced(have, group).item()) < ranks or made is None:
        return None  # on every rank: one that writes would wait for one that does not
    held, rank, addresses = made
    with torch.inference_mode(False):
        return Shared(
            rank,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32).pin_memory(),
            held=held,
        )


def stop_waiting(group: str) -> None:
    """Have whoever waits for a rank of a group go on; its sums are wrong from then on."""
    shared = _of_groups.get(group)
    if shared is not None:
        shared.stop.fill_(1)


def forget() -> None:
    """Let go of all memory: process groups end, and no graph with their sums is run again."""
    _of_groups.clear()
