"""Stand-ins of windows, distilled: KL(full model || windows) of the next token falls.

As `adaskip_fx.fitting.distillation` does with surrogates of skipped sublayers: kinds of samples in
turn, answers with half of a question's weight, a learning rate that rises and falls, and the best
state on held-out samples, the closed form included. Gradients flow through the eager model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from adaskip_fx.fitting.weighted_sample import Sample
from adaskip_fx.plans.sublayer import Sublayer

from .stand_ins import StandIn
from .windowed_model import WindowedModel

STEPS = 200
_RATE = 1e-2  # of each tensor's own size, at most
_WARM_UP = 0.05  # of the steps, in which the learning rate rises
_JUDGED = 4  # times
_ROWS = 512  # tokens whose distributions are compared at once
_HELD_OUT = 5  # of so many samples of a kind, one


def refine(
    model: WindowedModel, kinds: Sequence[Sequence[Sample]], steps: int = STEPS
) -> dict[int, float]:
    """Move the stand-ins of a running model towards the full one.

    Args:
        model: Its stand-ins are exchanged for better ones.
        kinds: Samples of each kind; of each every fifth is held out, and at least one of two.
        steps: Of descent, one sample each.

    Returns:
        KL in nats a token on held-out samples, by step; step 0 is before any change.

    Raises:
        ValueError: A kind has one sample alone.
    """
    if any(len(samples) < 2 for samples in kinds):
        raise ValueError("refinement needs two samples of each kind: give more --samples")
    held_out = [sample for samples in kinds for sample in samples[::_HELD_OUT]]
    train = [[s for n, s in enumerate(samples) if n % _HELD_OUT] for samples in kinds]
    begun = dict(model.stand_ins)
    changes = {
        (sublayer, name): torch.zeros_like(getattr(stand_in, name), requires_grad=True)
        for sublayer, stand_in in begun.items()
        for name in ("down", "up", "bias")
        if getattr(stand_in, name).numel()
    }
    parameters = [*changes.values()]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98))
    losses, best = {0: _mean(model, held_out)}, begun
    for step in range(steps):
        model.stand_ins = _changed(begun, changes)
        mine = train[step % len(train)]
        loss = _loss(model, mine[step // len(train) % len(mine)])
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # what float16 cannot hold
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        optimizer.step()
        if (step + 1) % max(1, steps // _JUDGED) == 0:
            with torch.no_grad():
                model.stand_ins = _changed(begun, changes)
            found = _mean(model, held_out)
            best = model.stand_ins if found < min(losses.values()) else best
            losses[step + 1] = found
    model.stand_ins = best
    return losses


def _changed(
    begun: Mapping[Sublayer, StandIn], changes: Mapping[tuple[Sublayer, str], torch.Tensor]
) -> dict[Sublayer, StandIn]:
    """Return stand-ins with changes in units of the root mean square of each tensor."""
    made = dict(begun)
    for (sublayer, name), change in changes.items():
        before = getattr(begun[sublayer], name)
        moved = before + before.square().mean().sqrt() * change
        made[sublayer] = replace(made[sublayer], **{name: moved})
    return made


def _rate(step: int, steps: int) -> float:
    rise = min(1.0, (step + 1) / (_WARM_UP * steps + 1))
    return _RATE * rise * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _mean(model: WindowedModel, samples: Sequence[Sample]) -> float:
    """Return the mean over samples of KL in nats a token."""
    return sum(float(_loss(model, s)) / s.ids.shape[1] for s in samples) / len(samples)


def _loss(model: WindowedModel, sample: Sample) -> torch.Tensor:
    """Return KL, times the tokens: gradients of a mean would vanish in float16."""
    with torch.no_grad():
        wanted = model.logits(sample.ids, full=True)[0]
    shares = sample.shares.to(wanted.device) * len(wanted)
    rows = wanted, model.logits(sample.ids)[0], shares
    parts = zip(*(torch.split(x, _ROWS) for x in rows), strict=True)
    return torch.stack(
        [checkpoint(_divergence, *part, use_reentrant=False) for part in parts]
    ).sum()


def _divergence(wanted: torch.Tensor, found: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    p, q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * shares).sum()
