"""Programs whose surrogates are learned: what autograd sees of a captured graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.programs.program import Link, Program
from adaskip_fx.runtime.runtime import Runtime
from adaskip_passes import fuse
from adaskip_passes.transforms.drop_cache_writes import differentiable
from adaskip_passes.transforms.skip import surrogate_inputs

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


class Trainable(Program):
    """A program of prompts whose surrogates are learned, and whose logits have gradients.

    learned: by sublayer; several graphs of one model have them in common.
    compiled: whether Inductor compiles the graph, forward and backward.
    """

    composed = False
    learned: ClassVar[Mapping[Sublayer, Learned]] = {}
    compiled: ClassVar[bool] = False

    def _link(self, outer: fx.GraphModule, how: Link) -> Callable[..., Any]:
        sublayers = self.phase.sublayers
        inputs = surrogate_inputs(outer.graph)
        self._places = {n: (sublayers[i], tensor) for n, (i, tensor) in inputs.items()}
        whole = differentiable(fuse(outer))
        return torch.compile(whole, dynamic=False) if self.compiled else whole

    def run(self, arguments: Any, fixed: Any, valid: Any) -> tuple[Any, ...]:
        still = tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in fixed)
        with torch.enable_grad():
            self._tensors = tuple(
                self.learned[self._places[name][0]].tensor(self._places[name][1]).to(like.dtype)
                for name, like in self.surrogates.items()
            )
            return super().run(arguments, still, valid)

    @classmethod
    def parameters(cls) -> list[torch.Tensor]:
        """What gradient descent moves."""
        return [change for one in cls.learned.values() for change in one.changes.values()]

    @classmethod
    def learned_surrogates(cls) -> Surrogates:
        """The surrogates as they are now."""
        return Surrogates({s: one.surrogate() for s, one in cls.learned.items()})


@contextmanager
def training(
    runtime: Runtime,
    plan: SkipPlan,
    whitenings: Mapping[Sublayer, Whitening],
    compiled: bool = False,
) -> Iterator[type[Trainable]]:
    """Meanwhile the programs of `runtime` are trainable; yields their type.

    Args:
        runtime: of a compiled model.
        plan: the surrogates of what its prefill does not run are learned.
        whitenings: by sublayer, of linear maps.
        compiled: whether Inductor compiles them, anew for each number and length of rows.
    """
    learned = {
        s: Learned(c, whitenings.get(s), runtime.device)
        for s, c in plan.surrogates.by_sublayer.items()
        if s in plan.prefill
    }
    trained = type("Trainable", (Trainable,), {"learned": learned, "compiled": compiled})
    before = runtime.graphs.program_type
    runtime.graphs.program_type = trained
    try:
        with warnings.catch_warnings():
            # Dynamo looks at the gradient of every tensor that it is given.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            yield trained
    finally:
        runtime.graphs.program_type = before
