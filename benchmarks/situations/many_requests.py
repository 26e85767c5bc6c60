"""Many requests of random lengths, one after another and from threads, against their own times."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import models
from ..ceilings import seconds
from .bench import Bench
from .rows import Row

_REQUESTS, _THREADS = 32, 4
#: How many requests there have been when memory is to rise no more.
_SETTLED = 10
_MIB = 2**20


@dataclass(frozen=True)
class Request:
    """A prompt's length and the tokens that follow it."""

    prompt: int
    new: int


def many_requests(bench: Bench) -> Iterator[Row]:
    """Tokens a second against what prompts and steps of these lengths take, and memory.

    What prompts and steps take is measured at a few lengths, and taken to lie on straight lines
    between them. Memory is what the card has less of after all requests than after ten of them,
    and after all of them once more. (Of the first the allocator's blocks are a part, in which a
    prompt that is longer than all before it finds no place, and the last request's K/V.)
    """
    requests = drawn(bench.sizes.first, bench.sizes.short)
    new = sum(request.new for request in requests)
    promised = _promise(bench, requests)
    for request in requests[:2]:  # what is compiled and recorded at first
        _answer(bench, request)
    used: list[float] = []

    def in_turn() -> None:
        for request in requests:
            _answer(bench, request)
            used.append(_used(bench.device))

    def from_threads() -> None:
        parts = [requests[n::_THREADS] for n in range(_THREADS)]
        threads = [threading.Thread(target=_answer_all, args=(bench, part)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for how, run in (("in turn", in_turn), (f"from {_THREADS} threads", from_threads)):
        (took,) = seconds(run, bench.device, 1, 0)
        what = f"{len(requests)} requests {how}: their prompts and steps alone"
        rates = new / took, new / promised
        yield Row(what, *rates, 0.90, at_least=True, unit="tokens/s", notes={"new_tokens": new})
    if bench.device.type == "cuda":
        in_turn()
        count, notes = len(requests), {"used_bytes": used}
        for what, now, before in (
            (f"memory after {count} requests less than after {_SETTLED}", count, _SETTLED),
            ("memory after the same once more less than before", 2 * count, count),
        ):
            more = (used[now - 1] - used[before - 1]) / _MIB
            yield Row(what, more, None, 2, of="measured", unit="MiB", notes=notes)
    yield _of_one_token(bench)


def drawn(least: int, most: int, count: int = _REQUESTS) -> list[Request]:
    """Return requests of random lengths, the same ones in every run."""
    draw = random.Random(0)
    shortest, longest = max(1, least // 62), max(2, most // 32)  # 16 and 256 on a GPU
    return [
        Request(draw.randint(least, most), draw.randint(shortest, longest)) for _ in range(count)
    ]


def _promise(bench: Bench, requests: Sequence[Request]) -> float:
    """Return the seconds that the prompts and the steps of requests take by themselves."""
    first, last = bench.sizes.first, bench.sizes.short
    lengths = [first + n * (last - first) // 3 for n in range(4)]
    prompts, steps = [], []
    for length in lengths:
        ids = models.tokens(1, length)
        runs, _ = bench.times({"prompt": lambda ids=ids: bench.filled(ids)}, settle=6)
        prompts.append(runs["prompt"])
        steps.append(bench.step_seconds(bench.filled(ids)))
        bench.begin()
    read = np.interp([r.prompt for r in requests], lengths, prompts)
    halfway = np.interp([r.prompt + r.new // 2 for r in requests], lengths, steps)
    return float(read.sum() + halfway @ [r.new - 1 for r in requests])


def _answer(bench: Bench, request: Request) -> None:
    ids = models.tokens(1, request.prompt)
    bench.fast.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.new,
        do_sample=False,
    )


@torch.inference_mode()
def _answer_all(bench: Bench, requests: Sequence[Request]) -> None:
    """(Inference mode is of a thread.)"""
    for request in requests:
        _answer(bench, request)


def _used(device: torch.device) -> float:
    """Return the bytes of the card that are taken; nothing is asked elsewhere."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free)


def _of_one_token(bench: Bench) -> Row:
    """What a request of one token keeps after a long one, against before."""
    ids, sizes = models.tokens(1, 1), list[int]()
    for length in (1, bench.sizes.long, 1):
        bench.fast.generate(input_ids=models.tokens(1, length), max_new_tokens=1, do_sample=False)
        cache = bench.fast.adaskip.new_cache()
        bench.fast(input_ids=ids, past_key_values=cache)
        sizes.append(cache.nbytes)
        del cache
    what = f"K/V of one token after one of {bench.sizes.long}: before"
    return Row(what, sizes[-1] / _MIB, sizes[0] / _MIB, 1.0, unit="MiB")
