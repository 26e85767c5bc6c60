"""A sum over ranks in one kernel: each writes its part into the others' memory, and adds up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...infra.launch import Launch, has_pdl
from ..shared_memory import PROGRAMS, Shared

_BLOCK = 1024  # numbers of a program


@triton.jit
def _sum_over_ranks(
    x, residual, output, addresses, turns, stop, n,
    RANK: tl.constexpr, SIZE: tl.constexpr, PROGRAMS: tl.constexpr, BYTES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers a program, which meets the same program of the other ranks.

    The memory at each of `addresses` begins with int32 [SIZE, PROGRAMS]: in which turn each rank's
    program has written there. Parts follow, [2, SIZE] of BYTES each: those of one turn may still be
    read while the next one's are written. A program that has begun its turn has ended the one
    before, and who waits for it no longer reads that.
    """
    pid = tl.program_id(0)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    real = at < n
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    turn = tl.load(turns + pid) + 1
    own = tl.load(x + at, mask=real, other=0.0)
    parts = (turn & 1).to(tl.int64) * (SIZE * BYTES) + SIZE * PROGRAMS * 4
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            part = tl.load(addresses + rank) + parts + RANK * BYTES
            tl.store(part.to(tl.pointer_type(x.dtype.element_ty)) + at, own, mask=real)
    tl.debug_barrier()
    for rank in tl.static_range(SIZE):
        if rank != RANK:
            written = tl.load(addresses + rank).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(written + RANK * PROGRAMS + pid, turn, sem="release", scope="sys")
    here = tl.load(addresses + RANK)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):  # in the same order on all ranks
        if rank == RANK:
            total += own.to(tl.float32)
        else:
            written = here.to(tl.pointer_type(tl.int32)) + rank * PROGRAMS + pid
            last = tl.atomic_add(written, 0, sem="acquire", scope="sys")
            tries, stopped = 0, 0
            while (last - turn < 0) & (stopped == 0):
                last = tl.atomic_add(written, 0, sem="acquire", scope="sys")
                tries += 1
                if tries % 1024 == 0:
                    stopped = tl.load(stop, volatile=True)
            tl.debug_barrier()
            part = (here + parts + rank * BYTES).to(tl.pointer_type(x.dtype.element_ty))
            total += tl.load(part + at, mask=real, other=0.0, volatile=True).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=real)
    tl.store(turns + pid, turn)


def rank_sum(x: torch.Tensor, residual: torch.Tensor | None, shared: Shared) -> Launch:
    """Return the launch of :func:`rank_sums.sum_over_ranks`.

    Args:
        x: At most `MOST_NUMBERS` numbers.
        residual: Of its shape, or None.
        shared: What the ranks write to.

    """
    x = x.contiguous()
    output = torch.empty_like(x)
    pdl = has_pdl(x.device)
    flags = {
        **{"RANK": shared.rank, "SIZE": shared.size, "PROGRAMS": PROGRAMS, "BYTES": shared.bytes},
        **{"BLOCK": _BLOCK, "PDL": pdl, "num_warps": 4},
        **({"launch_pdl": True} if pdl else {}),
    }
    given = None if residual is None else residual.contiguous()
    arguments = (x, given, output, shared.addresses, shared.turns, shared.stop, x.numel())
    return Launch(_sum_over_ranks, (triton.cdiv(x.numel(), _BLOCK),), arguments, flags, [output])
