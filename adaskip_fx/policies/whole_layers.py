"""What policies share that skip whole layers: how many, which may go, and the plan of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.policies.base import plan_without

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class WholeLayers(ABC):
    """A policy that leaves out whole decoder layers, in prefill and decode.

    scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4) instead of `x`.
    protected: whether the first two layers and the last always run.

    Neither is part of the rules as their authors give them; both make a comparison with policies
    that choose single sublayers a fair one.
    """

    scaled: bool = False
    protected: bool = False

    name: ClassVar[str] = ""

    @abstractmethod
    def choose(self, candidates: list[int], count: int) -> Collection[int]:
        """`count` of the layers `candidates` (in order), to be skipped."""

    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Skip `skip_count(alpha, L)` of the model's L layers, whatever was measured.

        ValueError for an `alpha` that `skip_count` refuses, or when too few layers may be skipped.
        """
        layers = sorted({s.layer for s in profile.sublayers})
        count = skip_count(alpha, len(layers))
        candidates = [i for i in layers if not (self.protected and i in _always(layers))]
        if count > len(candidates):
            raise ValueError(
                f"alpha {alpha} skips {count} of {len(layers)} layers, but {self.name} may skip "
                f"{len(candidates)}: take a smaller alpha"
            )
        chosen = self.choose(candidates, count) if count else ()
        skip = [s for s in profile.sublayers if s.layer in chosen]
        return plan_without(profile, skip, self.scaled)


def _always(layers: list[int]) -> set[int]:
    return {*layers[:2], layers[-1]}
