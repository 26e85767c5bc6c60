"""What is measured of a model on several ranks, each part as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import SkipPlan

from .. import models
from ..ceilings import MatrixRate, copy_rate
from ..floors import decode_bytes, kv_bytes, prefill_flop
from ..situations.rows import Row, over
from . import processes
from .collectives import Collectives
from .subject import SHAPES, Subject, ids, sharded

#: Thousandths of the largest logit that other kernels may cause.
_FLOAT32 = 0.1
_BFLOAT16 = 50


def logits(subject: Subject) -> Iterator[Row]:
    """A smaller model's logits beside transformers' own, in its dtype and in float32.

    The same weights in float32 tell how far each of the two is off by rounding alone.
    """
    shape = SHAPES[subject.name]
    model = sharded(shape.config, min(shape.compared_layers, subject.layers))
    text = ids(subject.sizes.compared)
    theirs, ours = _logits(model, text)
    _to_float32(model)
    their_32, our_32 = _logits(model, text)
    what = f"logits of {text.shape[1]} tokens, {model.config.num_hidden_layers} layers"
    plain: dict[str, Any] = {"unit": "1e-3", "of": "measured"}
    for name, got, beside, target in (
        (f"{what}: ours beside theirs", ours, theirs, _BFLOAT16),
        (f"{what}: ours beside theirs in float32", ours, their_32, _BFLOAT16),
        (f"{what}: theirs beside theirs in float32", theirs, their_32, None),
        (f"{what}, float32: ours beside theirs", our_32, their_32, _FLOAT32),
    ):
        yield Row(name, 1000 * processes.largest(_difference(got, beside)), None, target, **plain)


def _logits(model: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' logits, and the compiled model's."""
    backend = "inductor" if text.is_cuda else "eager"
    compiled: Any = build(model, None, backend=backend)
    theirs = model(input_ids=text, use_cache=False).logits
    return theirs, compiled(input_ids=text).logits


def _to_float32(model: Any) -> None:
    """Exchange a model's weights; ``Module.to`` does not for those that others hold as well."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                wide = torch.nn.Parameter(parameter.detach().float(), requires_grad=False)
                module._parameters[name] = wide


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the largest value."""
    wanted = expected.float()
    return float((got.float() - wanted).abs().max() / wanted.abs().max())


def decode(subject: Subject) -> Iterator[Row]:
    """Steps over their floor, and over transformers' own."""
    collectives, sizes = Collectives(subject), subject.sizes
    for context in sizes.contexts:
        took = subject.step_seconds(context)
        sums = collectives.of_step(subject.plan)
        floor = step_floor(subject, subject.plan, context) + sums
        share = {"collectives_ms": 1000 * sums, "collectives_share": sums / took}
        yield over(f"step at {context}: floor", took, floor, 1.25, notes=share)
        subject.begin()
        theirs = subject.their_step_seconds(context)
        yield over(f"step at {context}: transformers", took, theirs, None)
        subject.begin()
    ours, alone = collectives.of_group()
    if alone:
        yield over("a sum over ranks in a step: the process group's", ours, alone, None)


def prompt(subject: Subject) -> Iterator[Row]:
    """A prompt over its floor, and over transformers' own."""
    tokens = subject.sizes.prompt
    took = subject.prompt_seconds(tokens)
    sums = Collectives(subject).of_prompt(subject.plan, tokens)
    floor = prompt_floor(subject, subject.plan, tokens) + sums
    share = {"collectives_ms": 1000 * sums, "collectives_share": sums / took}
    yield over(f"prompt of {tokens}: floor", took, floor, 1.25, notes=share)
    subject.begin()
    yield over(
        f"prompt of {tokens}: transformers", took, subject.their_prompt_seconds(tokens), None
    )


def skipping(subject: Subject) -> Iterator[Row]:
    """The time that a quarter of the sublayers takes, of what its floors promise is saved."""
    collectives, sizes = Collectives(subject), subject.sizes
    sublayers = subject.fast.adaskip.sublayers
    plan = models.random_plan(sublayers, len(sublayers) // 4)
    context, tokens = sizes.contexts[0], sizes.prompt
    ways: tuple[tuple[str, Callable[[], float], Callable[[SkipPlan], float]], ...] = (
        (
            f"step at {context}",
            lambda: subject.step_seconds(context),
            lambda p: step_floor(subject, p, context) + collectives.of_step(p),
        ),
        (
            f"prompt of {tokens}",
            lambda: subject.prompt_seconds(tokens),
            lambda p: prompt_floor(subject, p, tokens) + collectives.of_prompt(p, tokens),
        ),
    )
    for what, measured, floor in ways:
        subject.fast.adaskip.plan = subject.plan
        whole = measured()
        subject.fast.adaskip.plan = plan
        left = measured()
        promised = whole * (1 - floor(plan) / floor(subject.plan))
        share = (whole - left) / promised
        notes = {"saved_ms": 1000 * (whole - left), "promised_ms": 1000 * promised}
        name = f"{what}, {len(plan.decode)} of {len(sublayers)} skipped: share of promise"
        more: dict[str, Any] = {"of": "measured", "at_least": True, "unit": "of it"}
        yield Row(name, share, None, 0.85, notes=notes, **more)


def new_plan(subject: Subject) -> Iterator[Row]:
    """The first step with a plan that no rank has seen, beside the next one."""
    sizes, fast = subject.sizes, subject.fast
    sublayers = fast.adaskip.sublayers
    cache, token = subject.filled(sizes.contexts[0]), ids(1)
    subject.block(cache)()
    first, later = list[float](), list[float]()
    for seed in range(1 + sizes.new_plans):
        plan = models.random_plan(sublayers, max(1, len(sublayers) // 8), seed)
        cache.request.decode_with(plan)
        for times in (first, later):
            times.append(processes.largest(_step(fast, token, cache)))
    what = f"step with a new plan (largest of {sizes.new_plans}): the same again"
    slowest, again = max(first[1:]), sorted(later)[len(later) // 2]
    yield Row(what, 1000 * slowest, 1000 * again, 100, of="measured")


def _step(fast: Any, token: torch.Tensor, cache: Any) -> float:
    return processes.one(lambda: fast(input_ids=token, past_key_values=cache), token.device)


def memory(subject: Subject) -> Iterator[Row]:
    """What a rank stores of a request's keys and values, over its share of them."""
    cache = subject.filled(subject.sizes.contexts[-1])
    share = kv_bytes(subject.model, subject.plan, cache.capacity) / processes.count()
    what = f"K/V of a rank, room for {cache.capacity} tokens: its share"
    yield Row(what, cache.nbytes / 2**20, share / 2**20, 1.1, unit="MiB")


def step_floor(subject: Subject, plan: SkipPlan, context: int) -> float:
    """Return the least seconds of a step of a block: what a rank reads, collectives apart."""
    halfway = context + subject.sizes.steps // 2
    read = decode_bytes(subject.model, plan, halfway) / processes.count()
    return read / _rate("copy", subject)


def prompt_floor(subject: Subject, plan: SkipPlan, tokens: int) -> float:
    """Return the least seconds of a prompt: what a rank multiplies, collectives apart."""
    flop = prefill_flop(subject.model, plan, tokens) / processes.count()
    return flop / _rate("products", subject)


_rates: dict[tuple[str, torch.dtype], float] = {}


def _rate(of: str, subject: Subject) -> float:
    """Return what the slowest rank does in a second, measured at the first question."""
    key = of, subject.model.dtype
    if key not in _rates:
        if of == "copy":
            rate = copy_rate(subject.device)
        else:
            rate = MatrixRate(subject.device, subject.model.dtype).sustained()
        _rates[key] = -processes.largest(-rate)
    return _rates[key]


PARTS = (logits, decode, prompt, skipping, new_plan, memory)
