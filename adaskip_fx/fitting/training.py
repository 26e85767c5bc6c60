"""Programs whose surrogates are learned: what autograd sees of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.programs.instruments import Instrument
from adaskip_fx.programs.program import Program
from adaskip_passes import fuse, run_passes
from adaskip_passes.grouped_experts.plain_experts import PlainExperts
from adaskip_passes.transforms.differentiable_sums import DifferentiableSums
from adaskip_passes.transforms.drop_cache_writes import differentiable
from adaskip_passes.windows.plain_attention import PlainAttention

from .whitening import Whitening


class Learned:
    """One surrogate that is learned: as it was, and a change of each of its tensors.

    A linear map's change is made in whitened coordinates, and so is its bias's, in units of what
    the sublayer adds.

    changes: by tensor, float32, zero at first; what gradient descent moves.
    """

    def __init__(
        self, surrogate: Surrogate, whitening: Whitening | None, device: torch.device
    ) -> None:
        self.kind = surrogate.kind
        self.whitening = whitening
        self._begun = {
            name: torch.tensor(np.asarray(value, np.float32), device=device)
            for name, value in surrogate.tensors.items()
        }
        self.changes = {
            name: torch.zeros_like(value).requires_grad_(True)
            for name, value in self._begun.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is now, float32."""
        begun, change = self._begun[name], self.changes[name]
        if self.whitening is None:
            return begun + change
        if name == "weight":
            change = change @ self.whitening.root
        return begun + self.whitening.size * change

    @torch.no_grad()
    def surrogate(self) -> Surrogate:
        """The surrogate as it is now."""
        return Surrogate(self.kind, {name: self.tensor(name).cpu().numpy() for name in self._begun})


class Training(Instrument):
    """Programs of prompts whose surrogates are learned, and whose logits have gradients.

    It measures nothing: its requests learn nothing while decoding.

    Attributes:
        learned: What is learned, by sublayer; several graphs of one model have it in common.
        compiled: Whether Inductor compiles the graphs, forward and backward.
        ranks: How many run the model together. The gradients of all add up to the whole one.
    """

    composes = False

    def __init__(
        self, learned: Mapping[Sublayer, Learned], compiled: bool = False, ranks: int = 1
    ) -> None:
        """Learn some surrogates; see the attributes."""
        self.learned = learned
        self.compiled, self.ranks = compiled, ranks

    @classmethod
    def of(
        cls,
        plan: SkipPlan,
        whitenings: Mapping[Sublayer, Whitening],
        device: torch.device,
        compiled: bool = False,
        ranks: int = 1,
    ) -> Training:
        """Return an instrument that learns the surrogates of what a plan's prefill does not run.

        Args:
            plan: It has the surrogates as they are at first.
            whitenings: Those of linear maps, by sublayer.
            device: Where they are learned.
            compiled: Whether Inductor compiles the graphs, again for each number and length of
                rows.
            ranks: How many run the model together.
        """
        learned = {
            s: Learned(surrogate, whitenings.get(s), device)
            for s, surrogate in plan.surrogates.by_sublayer.items()
            if s in plan.prefill
        }
        return cls(learned, compiled, ranks)

    @property
    def key(self) -> Hashable:
        """Whether it compiles; what is learned is handed to a program at each run."""
        return type(self), self.compiled

    def link(self, program: Program, outer: fx.GraphModule) -> Callable[..., Any]:
        """Return the whole graph without its cache writes, as autograd can go through it."""
        sums = (DifferentiableSums(self.ranks),) if self.ranks > 1 else ()
        passes = (PlainAttention(), PlainExperts(), *sums)
        whole = run_passes(differentiable(fuse(outer)), passes, copy=False)
        return torch.compile(whole, dynamic=False) if self.compiled else whole

    def run(
        self,
        program: Program,
        arguments: Mapping[str, Any],
        weights: tuple[Any, ...],
        valid: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a program with the surrogates as they are now; its weights get no gradients."""
        still = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in weights)
        with torch.enable_grad():
            tensors = tuple(
                self.learned[sublayer].tensor(name).to(like.dtype)
                for (sublayer, name), like in zip(
                    program.surrogate_names, program.surrogates.values(), strict=True
                )
            )
            return program.run(arguments, still, valid, tensors)[0], None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What gradient descent moves."""
        return [change for one in self.learned.values() for change in one.changes.values()]

    def surrogates(self) -> Surrogates:
        """Return the surrogates as they are now."""
        return Surrogates({s: one.surrogate() for s, one in self.learned.items()})
