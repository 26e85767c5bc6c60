"""Decode steps: of several rows, of padded rows, in a cache that grows, and in `generate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .. import models
from ..ceilings import synchronize
from ..floors import kv_bytes, rows_bytes
from .bench import Bench, left_padded, real_lengths, relative_error
from .rows import Row, beyond, over

QUARTERS = (0, 0.25, 0.5, 0.75)
_BLOCK = 256  # tokens that a cache may have room for beyond twice what it holds


def padded_decode(bench: Bench) -> Iterator[Row]:
    """Four rows of which three are padded, against their floor and against full rows."""
    context = bench.sizes.short
    error = bench.eager_error(
        (bench.sizes.compared, 1), left_padded(bench.sizes.compared + 1, QUARTERS)
    )
    mask, ids = left_padded(context, QUARTERS), models.tokens(len(QUARTERS), context)
    lengths = real_lengths(mask)
    padded = bench.step_seconds(bench.filled(ids, mask), mask)
    floor = step_floor(bench, lengths)
    what = f"step, {len(lengths)} rows padded to {context}"
    real = {"real_tokens": sum(lengths)}
    yield over(f"{what}: floor", padded, floor, 1.20, eager_error=error, notes=real)
    full = bench.step_seconds(bench.filled(ids))
    yield over(f"{what}: full rows", padded, full, 1.00, eager_error=error, notes=real)


def unpadded_decode(bench: Bench) -> Iterator[Row]:
    """Two, four and eight rows, against their floors."""
    context = bench.sizes.short
    for rows in (2, 4, 8):
        error = bench.eager_error(
            (bench.sizes.compared, 1), left_padded(bench.sizes.compared + 1, [0] * rows)
        )
        took = bench.step_seconds(bench.filled(models.tokens(rows, context)))
        floor = step_floor(bench, [context] * rows)
        what = f"step, {rows} rows at {context}: floor"
        yield over(what, took, floor, 1.15, eager_error=error)


def step_floor(bench: Bench, lengths: Sequence[int]) -> float:
    """Return the least seconds of a step of a block that begins with rows of `lengths` tokens."""
    halfway = [length + bench.sizes.steps // 2 for length in lengths]
    return rows_bytes(bench.model, bench.plan, halfway) / bench.copy_rate()


def growth(bench: Bench) -> Iterator[Row]:
    """The pause where a request outgrows its cache, and the memory of one that has room to spare.

    The first step of a request is left out of the pauses: it prepares decoding, grown or not.
    """
    sizes, fast = bench.sizes, bench.fast
    ids = models.tokens(1, sizes.begun)
    bench.steps(bench.filled(ids))()  # compiles what any request needs
    bench.begin()
    cache, token, times = fast.adaskip.new_cache(), ids[:, :1].clone(), list[float]()
    fast(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    room = cache.capacity
    for _ in range(sizes.decoded):
        synchronize(bench.device)
        start = time.perf_counter()
        logits = fast(input_ids=token, past_key_values=cache).logits
        synchronize(bench.device)
        times.append(time.perf_counter() - start)
    text = torch.cat((ids, token.expand(1, sizes.decoded)), 1)
    error = relative_error(logits, bench.model(text, use_cache=False, logits_to_keep=1).logits)
    first, *others = times
    slowest = max(range(len(others)), key=others.__getitem__)
    notes = {
        "first_step_ms": 1000 * first,
        "slowest_at": sizes.begun + 2 + slowest,
        "capacity": [room, cache.capacity],
    }
    what = f"slowest of {sizes.decoded} steps from {sizes.begun}: median step"
    median = statistics.median(others)
    yield beyond(what, others[slowest], median, 5, eager_error=error, notes=notes)
    del cache
    yield from _spare_room(bench, ids)


def _spare_room(bench: Bench, ids: torch.Tensor) -> Iterator[Row]:
    """The memory of a request that may have many tokens and has few."""
    sizes, fast = bench.sizes, bench.fast
    bench.begin()
    output = fast.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_length=sizes.room,
        do_sample=False,
        stopping_criteria=[_Early(sizes.begun + sizes.generated)],
        return_dict_in_generate=True,
    )
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    yield _memory(bench, f"K/V of generate(max_length={sizes.room})", getattr(output, name))


def _memory(bench: Bench, what: str, cache: Any) -> Row:
    """A cache's bytes over those of its tokens; twice them and a block of tokens are allowed."""
    tokens = cache.length
    needed = kv_bytes(bench.model, bench.plan, tokens)
    return Row(
        f"{what}, {tokens} filled",
        cache.nbytes / 2**20,
        needed / 2**20,
        2 + _BLOCK / tokens,
        unit="MiB",
    )


class _Early(StoppingCriteria):  # type: ignore[misc]
    """Ends every row at a length, as a stop token does: `generate` cannot know it beforehand."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        ends = input_ids.shape[1] >= self._length
        return torch.full((input_ids.shape[0],), ends, device=input_ids.device)


EIGHTHS = tuple(i / 8 for i in range(8))


def generate_padded(bench: Bench) -> Iterator[Row]:
    """Tokens a second of `generate` on eight padded rows, against the bare steps of that batch.

    Of two runs of each kind the faster counts: the first one may prepare something.
    """
    context, tokens = bench.sizes.short, bench.sizes.generated
    error = bench.eager_error(
        (bench.sizes.compared, 1), left_padded(bench.sizes.compared + 1, EIGHTHS)
    )
    mask, ids = left_padded(context, EIGHTHS), models.tokens(len(EIGHTHS), context)
    step = bench.step_seconds(bench.filled(ids, mask), mask)
    bench.begin()
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "top_k=50": {"do_sample": True, "top_k": 50},
        "greedy, streamed": {"do_sample": False, "streamer": _Counter()},
    }
    for name, options in kinds.items():
        given = {"input_ids": ids, "attention_mask": mask, **options}
        took = min(generated_seconds(bench, given, tokens) for _ in range(2))
        rate, bare = len(EIGHTHS) / took, len(EIGHTHS) / step
        what = f"generate, {name}, {len(EIGHTHS)} rows padded to {context}: steps"
        more: dict[str, Any] = {"unit": "tokens/s", "eager_error": error}
        yield Row(what, rate, bare, 0.95, at_least=True, **more)


def generated_seconds(bench: Bench, given: dict[str, Any], tokens: int) -> float:
    """Return seconds of a token that `generate` makes, of so many after the prompt's."""
    marks = _Marks(bench.device)
    bench.fast.generate(
        **given,
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        logits_processor=LogitsProcessorList([marks]),
    )
    return marks.seconds() / tokens


class _Marks(LogitsProcessor):  # type: ignore[misc]
    """Marks when each token is chosen: on a GPU in its stream, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return scores

    def seconds(self) -> float:
        """Return the seconds from the first token to the last."""
        first, last = self._marks[0], self._marks[-1]
        if self._on_gpu:
            torch.cuda.synchronize()
            return float(first.elapsed_time(last)) / 1000
        return float(last - first)


class _Counter(BaseStreamer):  # type: ignore[misc]
    """A streamer that takes rows; transformers' own print one row alone."""

    def __init__(self) -> None:
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.numel()

    def end(self) -> None:
        """Do nothing."""
