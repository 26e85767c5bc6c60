"""What the steps of a request repeat that are handed views, so that it is looked up once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..capture.batch_sizes import BatchSizes
from ..capture.graph_key import GraphKey, GraphPhase, Surroundings
from ..plans.skip_plan import SkipPlan, Sublayer
from ..programs.instruments import Instrument
from ..programs.program import Program


class Form(NamedTuple):
    """What the graph of a step on views depends on, but for the model; see `GraphKey`."""

    phase: GraphPhase
    batch: int
    one_token: bool
    one_stored: bool
    masked: bool
    last_logits: bool
    surroundings: Surroundings
    embedded: bool
    axes: int
    by_head: bool

    def key(self, dtype: torch.dtype, device: torch.device) -> GraphKey:
        """Return the key of such a step's graph, of a model of this dtype on this device."""
        given = self._asdict()
        batch = BatchSizes.around(given.pop("batch"))
        return GraphKey(batch=batch, dtype=dtype, device=device, **given)


@dataclass(frozen=True)
class ViewBinding:
    """The program and the weights of a step, for others like it.

    Attributes:
        form: of the step.
        plan: that it ran with.
        probed: sublayers that it measured.
        instrument: what it did besides.
        program: that ran.
        weights: what it ran with.
        layout: dtype and device of the first of them that is of floating point; `to` may exchange
            what is in it.
    """

    form: Form
    plan: SkipPlan
    probed: tuple[Sublayer, ...]
    instrument: Instrument | None
    program: Program
    weights: tuple[Any, ...]
    layout: tuple[torch.dtype, torch.device] | None

    @classmethod
    def of(
        cls,
        form: Form,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        instrument: Instrument | None,
        program: Program,
        weights: tuple[Any, ...],
    ) -> ViewBinding:
        """Return it for a step that is about to run."""
        return cls(form, plan, probed, instrument, program, weights, _layout(weights))

    def serves(
        self,
        form: Form,
        plan: SkipPlan,
        probed: tuple[Sublayer, ...],
        instrument: Instrument | None,
    ) -> bool:
        """Whether the next step is like the last one."""
        return (
            self.plan is plan
            and self.instrument is instrument
            and self.form == form
            and self.probed == probed
            and self.layout == _layout(self.weights)
        )


def _layout(weights: tuple[Any, ...]) -> tuple[torch.dtype, torch.device] | None:
    for value in weights:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.dtype, value.device
    return None
