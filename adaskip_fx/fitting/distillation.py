"""Distil the full model into the surrogates of a plan, by gradient descent.

The closed form makes each surrogate explain its own sublayer; what matters is what the model
predicts in the end. All surrogates are moved together so that KL(full model || plan) of the next
token falls. Only surrogates change; the gradients flow through the captured graph itself.

Matrices are moved by Muon (Jordan et al. 2024, with the learning rate scaled as in Liu et al.,
"Muon is Scalable for LLM Training", 2025), all else by Adam: a linear map has many directions that
matter little each and much together, and Muon moves along all of them alike.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from adaskip_fx.parallel.ranks import Ranks
from adaskip_fx.plans.skip_plan import SkipPlan

from .fitter import Fitter
from .oom_backoff import OomBackoff
from .training import Training
from .weighted_sample import Sample
from .whitening import whitenings

_CHUNK = 512  # tokens whose distributions are compared at once
_COMPILED_CHUNK = 2048  # likewise, by fused kernels
_MIN_COMPILED_STEPS = 600  # from here on it pays to compile
_WARM_UP = 0.05  # of the steps, in which the learning rate rises


@dataclass(frozen=True)
class DistillConfig:
    """How to descend.

    Attributes:
        steps: of descent; each takes `batch_size` samples, from the groups of samples in turn.
        learning_rate: the highest one; it rises over the first twentieth of the steps and falls to
            0 along half a cosine.
        batch_size: samples of a step; those of one length go through the model together.
        eval_interval: steps after which validation samples are judged; the best state is kept, the
            beginning included.
        seed: of the choice of samples.
        compiled: whether Inductor compiles the model's graph, forward and backward, which pays for
            many steps; None: on a GPU, for 600 steps or more on samples of one length.

    Raises:
        ValueError: a number is not positive.
    """

    steps: int = 300
    learning_rate: float = 1e-3
    batch_size: int = 4
    eval_interval: int = 50
    seed: int = 0
    compiled: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "batch_size", "eval_interval"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")


@dataclass
class DistillLog:
    """What a distillation did.

    Attributes:
        losses: KL in nats a token on the validation samples, by step; step 0 is before any change.
        best_step: the step whose state was kept.
    """

    losses: dict[int, float] = field(default_factory=dict)
    best_step: int = 0


@contextmanager
def allow_tf32() -> Iterator[None]:
    """Let float32 products be rounded to TF32 within the block, where a GPU has that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def distill(
    fitter: Fitter,
    plan: SkipPlan,
    groups: Sequence[Sequence[Sample]],
    validation: Sequence[Sample],
    config: DistillConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SkipPlan, DistillLog]:
    """Return `plan` with its surrogates of skipped sublayers moved towards the full model.

    Args:
        fitter: of the model; its texts say along which directions streams lie (see `whitenings`).
        plan: with a surrogate for at least one sublayer that prefill does not run.
        groups: samples to descend on, by kind: steps take from each kind in turn.
        validation: other samples, to choose the best step on.
        config: see `DistillConfig`.
        progress: called with (steps done, steps in all).

    Returns:
        The plan, and what was seen on the way.

    Raises:
        ValueError: no samples, or no surrogate to move.
        UnsupportedError: gradients cannot flow through the model's graph.
    """
    config = config or DistillConfig()
    ranks = fitter.runtime.ranks
    if not groups or not all(groups) or not validation:
        raise ValueError("distillation needs samples to descend on and samples for validation")
    if not any(s in plan.surrogates.by_sublayer for s in plan.prefill):
        raise ValueError("the plan has no surrogate to distil into; fit one first")
    log = DistillLog()
    compiled = config.compiled
    if compiled is None:
        compiled = ranks.alone and _pays_to_compile(fitter, groups, config)
    if compiled:
        ranks.refuse("distilling with compiled=True", "leave it out")
    whitened = whitenings(fitter, plan)
    training = Training.of(plan, whitened, fitter.runtime.device, compiled, ranks.size)
    with allow_tf32(), warnings.catch_warnings():
        # Dynamo looks at the gradient of every tensor that it is given.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        loss = _Loss(fitter, plan, training)
        log.losses[0] = least = loss.mean(validation)
        best = training.surrogates()
        optimizer = _Optimizer(training.parameters, config, ranks)
        sampler = _Sampler(groups, config.seed)
        for step in range(config.steps):
            if progress is not None:
                progress(step, config.steps)
            optimizer.step(step, loss, [next(sampler) for _ in range(config.batch_size)])
            done = step + 1
            if done % config.eval_interval == 0 or done == config.steps:
                log.losses[done] = found = loss.mean(validation)
                if found < least:
                    least, log.best_step, best = found, done, training.surrogates()
    if progress is not None:
        progress(config.steps, config.steps)
    chosen = ranks.first("what was distilled", lambda: best)
    return plan.with_surrogates(plan.surrogates.merged(chosen)), log


def _pays_to_compile(
    fitter: Fitter, groups: Sequence[Sequence[Sample]], config: DistillConfig
) -> bool:
    lengths = {sample.ids.shape[1] for group in groups for sample in group}
    many = config.steps >= _MIN_COMPILED_STEPS
    return fitter.runtime.device.type == "cuda" and many and len(lengths) == 1


class _Optimizer:
    """Muon for matrices, and Adam for all else, with a learning rate that rises and falls."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], config: DistillConfig, ranks: Ranks
    ) -> None:
        self.config, self._ranks = config, ranks
        self.backoff = OomBackoff(config.batch_size, ranks.alone)
        self.parameters = list(parameters)
        matrices = [p for p in self.parameters if p.ndim == 2]
        others = [p for p in self.parameters if p.ndim != 2]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            # steps as large as those of Adam, so that one learning rate serves both
            muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        if others:
            self.optimizers.append(torch.optim.Adam(others, betas=(0.9, 0.98)))

    def step(
        self,
        step: int,
        loss: Callable[[Sequence[Sample]], torch.Tensor],
        samples: Sequence[Sample],
    ) -> None:
        """Take step number `step` along the mean gradient of samples, at once if there is room."""
        self.backoff(lambda size: self._set_gradients(loss, samples, size))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            optimizer.step()
        for parameter in self.parameters:
            self._ranks.of_first(parameter.detach())

    def _learning_rate(self, step: int) -> float:
        steps = self.config.steps
        rise = min(1.0, (step + 1) / (_WARM_UP * steps + 1))
        return self.config.learning_rate * rise * (1 + math.cos(math.pi * step / steps)) / 2

    def _set_gradients(
        self,
        loss: Callable[[Sequence[Sample]], torch.Tensor],
        samples: Sequence[Sample],
        size: int,
    ) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        for batch in _batches(samples, size):
            with self._ranks.step():
                gradients = torch.autograd.grad(loss(batch) / len(samples), self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                before = parameter.grad
                parameter.grad = gradient if before is None else before + gradient
        for parameter in () if self._ranks.alone else self.parameters:
            assert parameter.grad is not None
            parameter.grad = self._ranks.total(parameter.grad.contiguous())


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Yield batches of samples of one length, at most `size` in each."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        by_length.setdefault(sample.ids.shape[1], []).append(sample)
    for alike in by_length.values():
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


class _Sampler:
    """Yields samples of each group in turn; of a group each once before any comes again."""

    def __init__(self, groups: Sequence[Sequence[Sample]], seed: int) -> None:
        self._groups, self._rng = groups, random.Random(seed)
        self._left: list[list[Sample]] = [[] for _ in groups]
        self._turn = 0

    def __next__(self) -> Sample:
        group = self._turn % len(self._groups)
        self._turn += 1
        if not self._left[group]:
            self._left[group] = self._rng.sample(self._groups[group], len(self._groups[group]))
        return self._left[group].pop()


class _Loss:
    """KL(full model || plan) of the next token, in nats, weighted over a sample's tokens."""

    def __init__(self, fitter: Fitter, plan: SkipPlan, training: Training) -> None:
        self._runtime, self._plan, self._training = fitter.runtime, plan, training
        compiled = training.compiled
        self._full = SkipPlan.empty(plan.sublayers)
        self._chunk = _COMPILED_CHUNK if compiled else _CHUNK
        self._compare = torch.compile(_divergence, dynamic=False) if compiled else _divergence

    def __call__(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the sum over samples of one length."""
        ids = torch.cat([sample.ids for sample in samples])
        wanted = self._logits(ids, self._full).detach()
        shares = torch.cat([sample.shares for sample in samples]).to(wanted.device)
        rows = (wanted, self._logits(ids, self._plan), shares)
        chunks = zip(*(torch.split(t, self._chunk) for t in rows), strict=True)
        return torch.stack([self._compare(*chunk) for chunk in chunks]).sum()

    def mean(self, samples: Sequence[Sample]) -> float:
        """Return the mean over samples, as rank 0 has it."""
        mean = sum(float(self([sample]).detach()) for sample in samples) / len(samples)
        return self._runtime.ranks.first("a loss of distillation", lambda: mean)

    def _logits(self, ids: torch.Tensor, plan: SkipPlan) -> torch.Tensor:
        """Return float logits [B T, V] of ids [B, T]."""
        cache = self._runtime.new_cache(
            ids.shape[1], plan=plan, learn=False, instrument=self._training
        )
        return self._runtime.step(ids, None, None, cache, 0).flatten(0, 1)


def _divergence(wanted: torch.Tensor, found: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of KL(wanted || found), weighted by shares [n].

    Args:
        wanted: logits [n, V].
        found: logits [n, V].
        shares: weights [n].
    """
    p, q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) * shares).sum()
