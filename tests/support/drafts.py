"""Models that draft, and what is compared with them: the eager model, token by token."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.speculation.acceptance import Column, Sampling
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.proposals import Context, Drafts, Proposer
from adaskip_fx.speculation.speculation import Speculation
from tests.support.compiled_llamas import KINDS, SHAPES, make_model


@dataclass(frozen=True, eq=False)
class Drafting:
    """A model in float64, and the same compiled with what drafts."""

    model: Any
    fast: Any
    plan: SkipPlan  # that is drafted with, whatever other tests have drafted with

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = runtime_of(self.fast)
        return runtime

    def tokens(self, batch: int, count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.model.config.vocab_size, (batch, count), generator=generator)

    def begin(
        self,
        *proposers: Proposer,
        longest: int = 4,
        clock: Callable[[], float] | None = None,
    ) -> Speculation:
        """Draft with these from now on, as they are worth it by a clock or always."""
        decoding = Lossless(proposers, longest, adaptive=clock is not None)
        made = Speculation(decoding, self.plan, clock or time.perf_counter)
        self.runtime.speculation = made
        return made


@functools.cache
def drafting(
    shape: str = "grouped", skip: Sequence[str] = ("1.attention",), static: bool = False
) -> Drafting:
    """The process's one model of this shape that drafts with a plan."""
    model = make_model(shape, torch.float64)
    layers = range(SHAPES[shape]["num_hidden_layers"])
    names = [f"{layer}.{kind}" for layer in layers for kind in KINDS]
    plan = SkipPlan.of([*map(_sublayer, names)], skip)
    options = {"backend": "eager", "static_cache": static}
    fast = build(model, plan, decoding=Lossless((Lookup(),)), **options)
    speculation = runtime_of(fast).speculation
    assert speculation is not None
    return Drafting(model, fast, speculation.plan)


def _sublayer(name: str) -> Any:
    from adaskip_fx.plans.sublayer import Sublayer

    return Sublayer.parse(name)


@dataclass
class Oracle:
    """Proposes what the text will be, but for some places, where it is wrong.

    Attributes:
        text: all tokens, int64 [B, T].
        wrong: every so many-th draft is another token; 0: none is.
    """

    text: torch.Tensor
    wrong: int = 0
    name: str = "oracle"
    free: bool = True

    def __post_init__(self) -> None:
        self._rows: list[list[int]] = self.text.tolist()

    def begin(self) -> Oracle:
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        begin = context.input_ids.shape[1]
        places = range(begin, min(begin + most, len(self._rows[0])))
        wrong = [bool(self.wrong) and place % self.wrong == 0 for place in places]
        rows = [
            [abs(row[place] - off) for place, off in zip(places, wrong, strict=True)]
            for row in self._rows
        ]
        return Drafts.on_host(rows, "", 0.8) if places else None


class AlwaysAccepts(Sampling):
    """Wrong: a draft stands however likely it was to be proposed."""

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(drafts.tokens, dtype=torch.bool)


class DrawsAnew(Sampling):
    """Wrong: what takes a draft's place may be what would have been proposed anyway."""

    def replace(self, column: Column) -> tuple[torch.Tensor, torch.Tensor | None]:
        drawn, invalid = self.choose(column.scores)
        return torch.where(column.accepted, column.drafts, drawn), invalid
