"""Refine stand-ins by gradient descent towards the full model's predictions.

The closed form makes each stand-in explain its own sublayer; what matters is what the model says
in the end. All of them are moved together so that KL(full model || plan) of the next token gets
less. Only stand-ins change; the gradients flow through the captured graph itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from adaskip_fx.compensation import Compensation
from adaskip_fx.plan import SkipPlan
from adaskip_fx.programs import Link, Program
from adaskip_fx.runtime import Runtime
from adaskip_fx.stand_in import StandIn
from adaskip_fx.sublayer import Sublayer
from adaskip_passes import differentiable, fuse, stand_in_inputs

_CHUNK = 512  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Refinement:
    """How to descend.

    steps: of Adam; each takes `batch` texts.
    rate: learning rate at first; it falls to 0 along half a cosine.
    batch: texts of a step.
    every: steps after which held-out texts are judged; the best state is kept, the beginning
        included.
    seed: draws the texts of each step.

    ValueError for a number that is not positive.
    """

    steps: int = 200
    rate: float = 3e-4
    batch: int = 2
    every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rate", "batch", "every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")


class Trainable(Program):
    """A program of prompts whose stand-ins are parameters, and whose logits have gradients.

    shared: the parameters by input name; several graphs of one model have them in common.
    """

    folded = False
    shared: ClassVar[dict[str, torch.Tensor]] = {}
    places: ClassVar[dict[str, tuple[Sublayer, str]]] = {}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for name, tensor in self.stand_ins.items():
            if name not in self.shared:
                self.shared[name] = tensor.detach().float().clone().requires_grad_(True)

    def _link(self, outer: fx.GraphModule, how: Link) -> Callable[..., Any]:
        for name, (index, tensor) in stand_in_inputs(outer.graph).items():
            self.places[name] = self.phase.sublayers[index], tensor
        return differentiable(fuse(outer))

    def run(self, arguments: Any, fixed: Any, valid: Any) -> tuple[Any, ...]:
        still = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in fixed)
        with torch.enable_grad():
            self._tensors = tuple(self.shared[n].to(t.dtype) for n, t in self.stand_ins.items())
            return super().run(arguments, still, valid)

    @classmethod
    def compensation(cls, kinds: Compensation) -> Compensation:
        """The stand-ins as they are now, of the same kinds as those of `kinds`."""
        found: dict[Sublayer, dict[str, Any]] = {}
        for name, (sublayer, tensor) in cls.places.items():
            found.setdefault(sublayer, {})[tensor] = cls.shared[name].detach().cpu().numpy()
        return Compensation(
            {s: StandIn(kinds.stand_ins[s].kind, tensors) for s, tensors in found.items()}
        )


@dataclass
class Descent:
    """What a refinement did: KL in nats a token on held-out texts, by step, and the best of them.

    losses: by step, the first before any change.
    step: of the state that was kept.
    """

    losses: dict[int, float] = field(default_factory=dict)
    step: int = 0


def refine(
    runtime: Runtime,
    plan: SkipPlan,
    texts: Sequence[torch.Tensor],
    held_out: Sequence[torch.Tensor],
    how: Refinement | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SkipPlan, Descent]:
    """`plan` with its stand-ins of skipped sublayers refined.

    Args:
        runtime: of the compiled model.
        plan: with a stand-in for at least one sublayer that prefill does not run.
        texts: token ids int64 [1, T] to descend on.
        held_out: others, to choose the best step on.
        how: see `Refinement`.
        progress: called with (steps done, steps in all).

    Returns:
        The plan, and what was seen on the way.

    Raises:
        ValueError: no texts, or nothing to refine.
        RefusedError: gradients cannot flow through the model's graph.
    """
    how = how or Refinement()
    if not texts or not held_out:
        raise ValueError("refining needs texts to descend on and texts that are held out")
    draw, seen = random.Random(how.seed), Descent()
    with _training(runtime) as trained:
        seen.losses[0] = best = _mean(runtime, plan, held_out)
        parameters = list(trained.shared.values())
        if not parameters:
            raise ValueError("the plan has no stand-in to refine; fit one first")
        kept = [p.detach().clone() for p in parameters]
        descent = torch.optim.Adam(parameters, lr=how.rate, betas=(0.9, 0.99))
        for step in range(how.steps):
            if progress is not None:
                progress(step, how.steps)
            for group in descent.param_groups:
                group["lr"] = how.rate * (1 + math.cos(math.pi * step / how.steps)) / 2
            for _ in range(how.batch):
                loss = divergence(runtime, plan, draw.choice(texts)) / how.batch
                for parameter, slope in zip(
                    parameters, torch.autograd.grad(loss, parameters), strict=True
                ):
                    parameter.grad = slope if parameter.grad is None else parameter.grad + slope
            descent.step()
            descent.zero_grad()
            if (step + 1) % how.every == 0 or step + 1 == how.steps:
                seen.losses[step + 1] = found = _mean(runtime, plan, held_out)
                if found < best:
                    best, seen.step = found, step + 1
                    kept = [p.detach().clone() for p in parameters]
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
        refined = trained.compensation(plan.compensation)
    if progress is not None:
        progress(how.steps, how.steps)
    return plan.with_compensation(plan.compensation.merged(refined)), seen


@contextmanager
def _training(runtime: Runtime) -> Iterator[type[Trainable]]:
    """Meanwhile the programs of `runtime` are trainable, with parameters of their own."""
    trained = type("Trainable", (Trainable,), {"shared": {}, "places": {}})
    before = runtime.graphs.program_type
    runtime.graphs.program_type = trained
    try:
        yield trained
    finally:
        runtime.graphs.program_type = before


def divergence(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor) -> torch.Tensor:
    """The mean over a text's tokens of KL(full model || plan) of the next one, in nats."""
    full = _logits(runtime, SkipPlan.empty(plan.sublayers), ids).detach()
    total: torch.Tensor = torch.zeros((), device=full.device)
    parts = (torch.split(t, _CHUNK) for t in (full, _logits(runtime, plan, ids)))
    for want, got in zip(*parts, strict=True):
        p, q = want.float().log_softmax(-1), got.float().log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
    return total / ids.shape[1]


def _logits(runtime: Runtime, plan: SkipPlan, ids: torch.Tensor) -> torch.Tensor:
    cache = runtime.new_cache(ids.shape[1], plan=plan)
    return runtime.step(ids, None, None, cache, 0)[0]


def _mean(runtime: Runtime, plan: SkipPlan, texts: Sequence[torch.Tensor]) -> float:
    return sum(float(divergence(runtime, plan, ids).detach()) for ids in texts) / len(texts)
