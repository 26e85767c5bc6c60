"""The processes that torchrun has started, and times of all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .. import models
from ..ceilings import synchronize


def join() -> None:
    """Take the GPU of this process, and meet the others."""
    if models.device().type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if count() > 1 and not dist.is_initialized():
        on_gpu = models.device().type == "cuda"
        here = {"device_id": torch.device("cuda", torch.cuda.current_device())} if on_gpu else {}
        dist.init_process_group("nccl" if on_gpu else "gloo", **here)


def leave() -> None:
    """End the process group; nothing is measured after it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def largest(value: float) -> float:
    """Return the largest of all processes' values."""
    if count() == 1:
        return value
    held = torch.tensor([value], dtype=torch.float64, device=models.device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held.item())


def seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Return the median seconds of a run that all processes begin together, on the slowest."""
    device, times = models.device(), list[float]()
    for _ in range(warmup):
        run()
    for _ in range(repeats):
        times.append(one(run, device))
    return largest(statistics.median(times))


def one(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one run on this process, begun when all are there."""

    synchronize(device)
    if count() > 1:
        dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start
