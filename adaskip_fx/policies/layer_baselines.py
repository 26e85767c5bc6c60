"""Baselines that skip whole decoder layers: each is a rule of a few lines that picks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.policies.base import for_its_model, plan_without

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class LayerPolicy(ABC):
    """A policy that leaves out whole decoder layers, in prefill and decode.

    Neither field is part of the rules as their authors give them; both make a comparison with
    policies that choose single sublayers a fair one.

    Attributes:
        scaled: whether a skipped sublayer becomes AdaSkip's `scale * x` (eq. 4) instead of `x`.
        protected: whether the first two layers and the last always run.
    """

    scaled: bool = False
    protected: bool = False

    name: ClassVar[str] = ""

    @abstractmethod
    def choose(self, profile: Profile, candidates: list[int], count: int) -> Collection[int]:
        """Return `count` of the layers `candidates` (in order), to be skipped.

        Args:
            profile: what was measured.
            candidates: numbers of the layers that may be skipped; all of them unless `protected`.
            count: at least 0, at most as many as there are candidates.
        """

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return the plan that skips `skip_count(alpha, L)` of the model's L layers.

        Raises:
            ValueError: `skip_count` refuses `alpha`, or too few layers may be skipped.
        """
        layers = profile.layer_numbers
        always = {*layers[:2], layers[-1]} if self.protected else set[int]()
        candidates = [layer for layer in layers if layer not in always]
        count = skip_count(alpha, len(layers))
        if count > len(candidates):
            raise ValueError(
                f"alpha {alpha} skips {count} of {len(layers)} layers, but {self.name} may skip "
                f"{len(candidates)}: take a smaller alpha"
            )
        chosen = self.choose(profile, candidates, count)
        skip = [s for s in profile.sublayers if s.layer in chosen]
        return plan_without(profile, skip, self.scaled)


@dataclass(frozen=True)
class EarlyExit(LayerPolicy):
    """Exit at a fixed layer: the last layers are skipped (the baseline of AdaSkip's paper).

    When `protected`, the last layer itself runs; that is `ReverseOrder`. LITE (arXiv 2310.18581)
    and AdaInfer (arXiv 2403.02181) choose the exit token by token; at one speed-up for all tokens
    their plan is this one.
    """

    name: ClassVar[str] = "EarlyExit"

    def choose(self, profile: Profile, candidates: list[int], count: int) -> Collection[int]:
        """Return the last `count` candidates."""
        return candidates[len(candidates) - count :]


@dataclass(frozen=True)
class ReverseOrder(LayerPolicy):
    """Skip the last layers before the last one, which always runs (arXiv 2411.15558)."""

    name: ClassVar[str] = "ReverseOrder"

    def choose(self, profile: Profile, candidates: list[int], count: int) -> Collection[int]:
        """Return the last `count` candidates before the model's last layer."""
        before_last = [layer for layer in candidates if layer != profile.layer_numbers[-1]]
        return before_last[max(len(before_last) - count, 0) :]


@dataclass(frozen=True)
class UnifiedSkip(LayerPolicy):
    """Keep k layers at equal distances, the first and the last among them (arXiv 2404.06954).

    Of n candidates, the j-th layer that is kept is number `round(j (n - 1) / (k - 1))`, halves
    rounded up. Where the paper copies a skipped layer's K/V from the layer below while decoding,
    here it has none.
    """

    name: ClassVar[str] = "UnifiedSkip"

    def choose(self, profile: Profile, candidates: list[int], count: int) -> Collection[int]:
        """Return the `count` candidates between those that are kept."""
        last, kept = len(candidates) - 1, len(candidates) - count
        steps = max(kept - 1, 1)
        indices = {(2 * j * last + steps) // (2 * steps) for j in range(kept)}
        return [layer for index, layer in enumerate(candidates) if index not in indices]


@dataclass(frozen=True)
class ShortGPT(LayerPolicy):
    """Skip the layers of the least block influence, `1 - E cos(before, after)`.

    From ShortGPT (arXiv 2403.03853, eq. 1): the layers that turn the residual stream least.
    """

    name: ClassVar[str] = "ShortGPT"

    def choose(self, profile: Profile, candidates: list[int], count: int) -> Collection[int]:
        """Return the `count` most similar candidates, ties in the order of layers.

        Raises:
            ProfileError: the profile has no measurements of whole layers.
        """
        layers, similarity = profile.layer_numbers, profile.layer_similarity()
        ranking = [layers[i] for i in np.argsort(-similarity, kind="stable")]
        return [layer for layer in ranking if layer in candidates][:count]
