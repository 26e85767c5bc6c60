"""Refine surrogates by gradient descent towards the full model's predictions.

The closed form makes each surrogate explain its own sublayer; what matters is what the model says
in the end. All of them are moved together so that KL(full model || plan) of the next token gets
less. Only surrogates change; the gradients flow through the captured graph itself.

Matrices are moved by Muon (Jordan et al. 2024, with the rate as in Liu et al., "Muon is Scalable
for LLM Training", 2025), all else by Adam: a linear map has many directions that matter little each
and much together, and Muon moves along all of them alike.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from adaskip_fx.plans.skip_plan import SkipPlan

from .fitter import Fitter
from .oom_backoff import OomBackoff
from .precision import allow_tf32
from .training import Training
from .weighted_sample import Sample
from .whitening import whitenings

_CHUNK, _FUSED = 512, 2048  # tokens whose distributions are compared at once; by fused kernels
_WORTH = 600  # steps from which on it pays to compile
_WARM = 0.05  # of the steps, in which the rate rises


@dataclass(frozen=True)
class DistillConfig:
    """How to descend.

    steps: of descent; each takes `batch` samples, drawn from the groups of samples in turn.
    rate: the highest learning rate; it rises over the first twentieth of the steps and falls to 0
        along half a cosine.
    batch: samples of a step; those of one length go through the model together.
    every: steps after which held-out samples are judged; the best state is kept, the beginning
        included.
    seed: draws the samples of each step.
    compiled: whether Inductor compiles the model's graph, forward and backward, which pays for many
        steps; None: on a GPU, for 600 steps or more on samples of one length.

    ValueError for a number that is not positive.
    """

    steps: int = 300
    rate: float = 1e-3
    batch: int = 4
    every: int = 50
    seed: int = 0
    compiled: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rate", "batch", "every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")


@dataclass
class DistillLog:
    """What a refinement did: KL in nats a token on held-out samples, by step, and the best of them.

    losses: by step, the first before any change.
    step: of the state that was kept.
    """

    losses: dict[int, float] = field(default_factory=dict)
    step: int = 0


def refine(
    fitter: Fitter,
    plan: SkipPlan,
    groups: Sequence[Sequence[Sample]],
    held_out: Sequence[Sample],
    how: DistillConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SkipPlan, DistillLog]:
    """`plan` with its surrogates of skipped sublayers refined.

    Args:
        fitter: of the model; its texts say along which directions streams lie (see `whitenings`).
        plan: with a surrogate for at least one sublayer that prefill does not run.
        groups: samples to descend on, by kind: steps take from each kind in turn.
        held_out: others, to choose the best step on.
        how: see `DistillConfig`.
        progress: called with (steps done, steps in all).

    Returns:
        The plan, and what was seen on the way.

    Raises:
        ValueError: no samples, or nothing to refine.
        UnsupportedError: gradients cannot flow through the model's graph.
    """
    how = how or DistillConfig()
    if not groups or not all(groups) or not held_out:
        raise ValueError("refining needs samples to descend on and samples that are held out")
    if not any(s in plan.surrogates.by_sublayer for s in plan.prefill):
        raise ValueError("the plan has no surrogate to refine; fit one first")
    seen = DistillLog()
    compiled = how.compiled if how.compiled is not None else _worth_compiling(fitter, groups, how)
    whitened = whitenings(fitter, plan)
    training = Training.of(plan, whitened, fitter.runtime.device, compiled)
    with allow_tf32(), warnings.catch_warnings():
        # Dynamo looks at the gradient of every tensor that it is given.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        loss = _Loss(fitter, plan, training)
        seen.losses[0] = best = loss.mean(held_out)
        kept = training.surrogates()
        descent = _Rules(training.parameters, how)
        draws = _Draws(groups, how.seed)
        for step in range(how.steps):
            if progress is not None:
                progress(step, how.steps)
            descent.along(step, loss, [next(draws) for _ in range(how.batch)])
            if (step + 1) % how.every == 0 or step + 1 == how.steps:
                seen.losses[step + 1] = found = loss.mean(held_out)
                if found < best:
                    best, seen.step, kept = found, step + 1, training.surrogates()
    if progress is not None:
        progress(how.steps, how.steps)
    return plan.with_surrogates(plan.surrogates.merged(kept)), seen


def _worth_compiling(
    fitter: Fitter, groups: Sequence[Sequence[Sample]], how: DistillConfig
) -> bool:
    lengths = {sample.ids.shape[1] for group in groups for sample in group}
    return fitter.runtime.device.type == "cuda" and how.steps >= _WORTH and len(lengths) == 1


class _Rules:
    """Steps of Muon for matrices, and of Adam for all else, at a rate that rises and falls."""

    def __init__(self, parameters: list[torch.Tensor], how: DistillConfig) -> None:
        self.how = how
        self.room = OomBackoff(how.batch)
        self.parameters = parameters
        matrices = [p for p in self.parameters if p.ndim == 2]
        others = [p for p in self.parameters if p.ndim != 2]
        self.rules: list[torch.optim.Optimizer] = []
        if matrices:
            matched = "match_rms_adamw"  # as large as steps of Adam, so that one rate serves both
            self.rules.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn=matched))
        if others:
            self.rules.append(torch.optim.Adam(others, betas=(0.9, 0.98)))

    def along(
        self,
        step: int,
        loss: Callable[[Sequence[Sample]], torch.Tensor],
        samples: Sequence[Sample],
    ) -> None:
        """Step number `step`, down the mean slope of some samples, at once if there is room."""
        steps = self.how.steps
        rise = min(1.0, (step + 1) / (_WARM * steps + 1))
        rate = self.how.rate * rise * (1 + math.cos(math.pi * step / steps)) / 2
        self.room(lambda together: self._slope(loss, samples, together))
        for rule in self.rules:
            for group in rule.param_groups:
                group["lr"] = rate
            rule.step()

    def _slope(
        self,
        loss: Callable[[Sequence[Sample]], torch.Tensor],
        samples: Sequence[Sample],
        together: int,
    ) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        for some in _alike(samples, together):
            slopes = torch.autograd.grad(loss(some) / len(samples), self.parameters)
            for parameter, slope in zip(self.parameters, slopes, strict=True):
                parameter.grad = slope if parameter.grad is None else parameter.grad + slope


def _alike(samples: Sequence[Sample], most: int) -> Iterator[list[Sample]]:
    """Samples of one length, at most so many at once."""
    lengths: dict[int, list[Sample]] = {}
    for sample in samples:
        lengths.setdefault(sample.ids.shape[1], []).append(sample)
    for some in lengths.values():
        yield from (some[i : i + most] for i in range(0, len(some), most))


class _Draws:
    """Samples of each group in turn; of a group each once before any comes again."""

    def __init__(self, groups: Sequence[Sequence[Sample]], seed: int) -> None:
        self._groups, self._random = groups, random.Random(seed)
        self._left: list[list[Sample]] = [[] for _ in groups]
        self._turn = 0

    def __next__(self) -> Sample:
        at = self._turn % len(self._groups)
        self._turn += 1
        if not self._left[at]:
            self._left[at] = self._random.sample(self._groups[at], len(self._groups[at]))
        return self._left[at].pop()


class _Loss:
    """KL(full model || plan) of the next token, in nats, weighted over a sample's tokens."""

    def __init__(self, fitter: Fitter, plan: SkipPlan, training: Training) -> None:
        self._runtime, self._plan, self._training = fitter.runtime, plan, training
        compiled = training.compiled
        self._full = SkipPlan.empty(plan.sublayers)
        self._chunk = _FUSED if compiled else _CHUNK
        self._compare = torch.compile(_divergence, dynamic=False) if compiled else _divergence

    def __call__(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The sum over samples of one length."""
        ids = torch.cat([sample.ids for sample in samples])
        wanted = self._logits(ids, self._full).detach()
        shares = torch.cat([sample.shares for sample in samples]).to(wanted.device)
        rows = (wanted, self._logits(ids, self._plan), shares)
        parts = zip(*(torch.split(t, self._chunk) for t in rows), strict=True)
        return torch.stack([self._compare(*part) for part in parts]).sum()

    def mean(self, samples: Sequence[Sample]) -> float:
        """Over samples."""
        return sum(float(self([sample]).detach()) for sample in samples) / len(samples)

    def _logits(self, ids: torch.Tensor, plan: SkipPlan) -> torch.Tensor:
        """Float [B T, V] of ids [B, T]."""
        cache = self._runtime.new_cache(
            ids.shape[1], plan=plan, learn=False, instrument=self._training
        )
        return self._runtime.step(ids, None, None, cache, 0).flatten(0, 1)


def _divergence(wanted: torch.Tensor, found: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The sum over rows of KL(wanted || found) of logits [n, V] in nats, weighted by shares [n]."""
    p, q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * shares).sum()
