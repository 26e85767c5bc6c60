"""Prompts: padded, of a new length, on a filled cache, in chunks, and a few tokens to verify."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from .. import models
from ..ceilings import seconds
from ..floors import rows_flop, turn_flop
from .bench import Bench, left_padded, real_lengths, relative_error
from .decoding import QUARTERS
from .rows import Row, beyond, over


def padded_prompt(bench: Bench) -> Iterator[Row]:
    """Four rows of which three are padded, against their floor and against full rows."""
    context = bench.sizes.short
    error = bench.eager_error((bench.sizes.compared,), left_padded(bench.sizes.compared, QUARTERS))
    mask, ids = left_padded(context, QUARTERS), models.tokens(len(QUARTERS), context)
    lengths = real_lengths(mask)
    took, rate = bench.times(
        {
            "padded": functools.partial(bench.filled, ids, mask),
            "full": functools.partial(bench.filled, ids),
        },
        settle=10,
    )
    floor = rows_flop(bench.model, bench.plan, lengths) / rate
    what = f"prompt, {len(lengths)} rows padded to {context}"
    yield over(f"{what}: floor", took["padded"], floor, 1.15, eager_error=error)
    yield over(f"{what}: full rows", took["padded"], took["full"], 1.05, eager_error=error)


def new_length(bench: Bench) -> Iterator[Row]:
    """What the first request of a length takes beyond the next of that length, by `generate`.

    Lengths rise, so that no request finds room that an earlier one left.
    """
    sizes = bench.sizes

    def request(length: int) -> float:
        ids = models.tokens(1, length)
        make = functools.partial(
            bench.fast.generate,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
        )
        (took,) = seconds(make, bench.device, 1, 0)
        return took

    for _ in range(2):  # the very first compiles
        request(sizes.first // 2)
    lengths = [sizes.first + i * sizes.apart for i in range(10)]
    pairs = [(request(length), request(length)) for length in lengths]
    extra = [one - other for one, other in pairs]
    worst = max(range(10), key=extra.__getitem__)
    notes = {"lengths": lengths, "extra_ms": [1000 * e for e in extra]}
    what = f"16 tokens, first request of {lengths[worst]}: second (largest)"
    yield beyond(what, *pairs[worst], 15, notes=notes)
    first, again = (statistics.median(column) for column in zip(*pairs, strict=True))
    what = f"16 tokens, first request of {len(lengths)} lengths: second (median)"
    yield beyond(what, first, again, 15, chosen=1000 * statistics.median(extra))


#: Rows of which the first request is timed, after one of two.
ROWS = (3, 5, 8, 16)


def new_batch(bench: Bench) -> Iterator[Row]:
    """What the first request of a number of rows takes beyond the next of it, by `generate`.

    One of two rows before has what several rows need captured and compiled.
    """
    stats, length = bench.fast.adaskip.stats, bench.sizes.first

    def request(rows: int) -> float:
        ids = models.tokens(rows, length)
        make = functools.partial(
            bench.fast.generate,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
        )
        (took,) = seconds(make, bench.device, 1, 0)
        return took

    request(1)
    before = stats()
    request(2)
    compiled = stats().compile_seconds - before.compile_seconds
    notes = {"captures": stats().captures - before.captures}
    what = "pieces for several rows, compiled at the first request of two"
    yield Row(what, compiled, None, 6, of="measured", unit="s", notes=notes)
    for rows in ROWS:
        ids, before = models.tokens(rows, bench.sizes.compared), stats()
        pair = request(rows), request(rows)
        notes = {"captures": stats().captures - before.captures}
        expected = bench.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        error = relative_error(bench.fast(input_ids=ids, logits_to_keep=1).logits, expected)
        what = f"16 tokens, first request of {rows} rows: second"
        yield beyond(what, *pair, 300, eager_error=error, notes=notes)


def turn(bench: Bench) -> Iterator[Row]:
    """A second turn's prompt on a long filled cache, against its floor and the eager model."""
    stored, new = bench.sizes.long, bench.sizes.turn
    error = bench.eager_error((bench.sizes.compared, bench.sizes.turn))
    ids, more = models.tokens(1, stored), models.tokens(1, new)
    cache = bench.filled(ids, room=new + 1)

    def ours(tokens: int = new) -> None:
        cache.keep_first(stored)
        bench.fast(input_ids=more[:, :tokens], past_key_values=cache, logits_to_keep=1)

    ours()
    others = [seconds(functools.partial(ours, new - n), bench.device, 1, 0)[0] for n in range(1, 6)]
    took, rate = bench.times({"turn": ours}, warmup=1, settle=40)
    floor = turn_flop(bench.model, bench.plan, new, stored) / rate
    what = f"turn of {new} tokens on {stored}"
    yield over(f"{what}: floor", took["turn"], floor, 1.25, eager_error=error)
    first = statistics.median(others)
    yield over(f"{what}, the first of its length: floor", first, floor, None, eager_error=error)
    other = DynamicCache(config=bench.model.config)
    bench.model(input_ids=ids, past_key_values=other, logits_to_keep=1)

    def eager() -> None:
        bench.model(input_ids=more, past_key_values=other, logits_to_keep=1)
        other.crop(-new)

    theirs, _ = bench.times({"turn": eager})
    yield over(f"{what}: transformers, eager", took["turn"], theirs["turn"], None)


def chunks(bench: Bench) -> Iterator[Row]:
    """A long prompt that is read in pieces, against the same in one."""
    length, chunk = bench.sizes.long, bench.sizes.chunk
    error = bench.eager_error([bench.sizes.compared // 2] * 2)
    ids = models.tokens(1, length)

    def pieces() -> None:
        cache = bench.fast.adaskip.new_cache(capacity=length + 128)
        for piece in ids.split(chunk, 1):
            bench.fast(input_ids=piece, past_key_values=cache, logits_to_keep=1)

    whole = functools.partial(bench.filled, ids)
    took, _ = bench.times({"pieces": pieces, "whole": whole}, settle=10)
    what = f"prompt of {length} in chunks of {chunk}: in one piece"
    yield over(what, took["pieces"], took["whole"], 1.10, eager_error=error)


#: New tokens to the most that they may take over a decode step, by length.
VERIFIED: tuple[tuple[str, dict[int, float]], ...] = (
    ("short", {8: 1.05, 16: 1.12, 17: 1.12}),
    ("long", {8: 1.08, 16: 1.15, 17: 1.15}),
    ("longest", {8: 1.10}),
)


def verify(bench: Bench) -> Iterator[Row]:
    """A few tokens with all of their logits on a filled cache, against a decode step there."""
    errors = {n: bench.eager_error((bench.sizes.compared, n), keep=0) for n in (8, 16, 17)}
    for which, targets in VERIFIED:
        length = getattr(bench.sizes, which)
        cache = bench.filled(models.tokens(1, length))
        runs: dict[str, Any] = {"step": bench.steps(cache)}
        for count in targets:
            runs[str(count)] = functools.partial(_verified, bench, cache, count, length)
        blocks, _ = bench.times(runs, warmup=1)
        took = {name: block / bench.sizes.steps for name, block in blocks.items()}
        for count, target in targets.items():
            what = f"{count} tokens with their logits on {length}: decode step"
            yield over(what, took[str(count)], took["step"], target, eager_error=errors[count])
        del cache, runs
        bench.begin()


def _verified(bench: Bench, cache: Any, count: int, length: int) -> None:
    """A block of calls, each of which is taken back."""
    ids = models.tokens(1, count)
    cache.keep_first(length)
    for _ in range(bench.sizes.steps):
        bench.fast(input_ids=ids, past_key_values=cache)
        cache.crop(-count)


def logits_to_keep(bench: Bench) -> Iterator[Row]:
    """How many graphs other numbers of logits need, on a prompt that was read before."""
    stats, values = bench.fast.adaskip.stats, range(2, 20)
    ids, error = models.tokens(1, 64), math.inf
    bench.filled(ids)
    before, tried = stats().captures, 0
    for value in values:
        cache = bench.fast.adaskip.new_cache(capacity=128)
        logits = bench.fast(input_ids=ids, past_key_values=cache, logits_to_keep=value).logits
        tried += 1
        if value == values[0]:
            expected = bench.model(input_ids=ids, use_cache=False, logits_to_keep=value).logits
            error = relative_error(logits, expected)
        if stats().captures - before > 2:  # each takes seconds, and the target is missed already
            break
    made = stats().captures - before
    yield Row(
        f"captures for {tried} numbers of logits, {values[0]} to {values[tried - 1]}",
        made,
        None,
        1,
        of="measured",
        unit="captures",
        eager_error=error,
        notes={"tried": tried, "values": len(values)},
    )
