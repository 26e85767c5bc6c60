"""EvoPress (arXiv 2410.14649): evolution of the set of sublayers that are skipped."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adaskip_fx.policies.adaskip import AdaSkip
from adaskip_fx.policies.base import for_its_model
from adaskip_fx.policies.candidates import Evaluator, FitSurrogates, candidate, skippable

if TYPE_CHECKING:
    from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
    from adaskip_fx.policies import PlanPolicy
    from adaskip_fx.profiles.profile import Profile


@dataclass(frozen=True)
class Evolve:
    """Improve another policy's plan; how many sublayers are skipped stays the same.

    In each generation the plan has offspring, in which a few sublayers have changed places: one
    that was skipped runs and another one is skipped instead (level switch). They are selected in
    several steps, on more and more samples; in the last the parent takes part, so the plan never
    gets worse on the samples of that step.

    Attributes:
        evaluator: judges candidate plans.
        start: makes the plan to begin with.
        generations: how many generations there are.
        offspring: candidates of each generation.
        selection: one pair for each step of selection: how many candidates survive it, and on how
            many samples they are judged (None for all). One survives the last.
        switches: sublayers that change places in an offspring, at most; their number is the lesser
            of two random numbers from 1 to this.
        same_kind: whether attention changes places with attention only, and ffn with ffn.
        seed: of the random numbers.
        fit_surrogates: fits surrogates for each candidate, as for `Greedy`.
        scaled: without `fit_surrogates`, whether a skipped sublayer becomes AdaSkip's `scale * x`.
        protected: whether the first two layers and the last always run, unless `start` skips them.
        never: other sublayers that always run, unless `start` skips them.

    Raises:
        ValueError: a number is below 1, or the selection does not end with one survivor.
    """

    evaluator: Evaluator
    start: PlanPolicy = field(default_factory=AdaSkip)
    generations: int = 40
    offspring: int = 16
    selection: tuple[tuple[int, int | None], ...] = ((4, 1), (1, None))
    switches: int = 3
    same_kind: bool = True
    seed: int = 0
    fit_surrogates: FitSurrogates | None = None
    scaled: bool = False
    protected: bool = False
    never: frozenset[Sublayer] = frozenset()

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "switches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Evolve: {name} must be at least 1, got {getattr(self, name)!r}")
        if not self.selection or self.selection[-1][0] != 1:
            raise ValueError(
                f"Evolve: the last step of selection leaves one survivor, got {self.selection!r}"
            )

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> SkipPlan:
        """Return the best plan of the last generation.

        Raises:
            ValueError: as `start` does.
        """
        first = self.start.plan(profile, alpha).skipped("prefill")
        free = skippable(profile, self.protected, self.never, 0, "Evolve")
        rng = random.Random(self.seed)
        parent = self._candidate(profile, frozenset(first))
        for _ in range(self.generations if first else 0):
            skipped = frozenset(parent.skipped("prefill"))
            sets = {self._mutated(skipped, free, rng) for _ in range(self.offspring)} - {skipped}
            # in an order that does not depend on how sets are hashed
            pool = [self._candidate(profile, skip) for skip in sorted(sets, key=sorted)]
            parent = self._selected(parent, pool)
        return parent

    def _selected(self, parent: SkipPlan, pool: list[SkipPlan]) -> SkipPlan:
        for number, (survivors, samples) in enumerate(self.selection, 1):
            if number == len(self.selection):
                pool = [parent, *pool]
            pool = sorted(pool, key=lambda plan: self.evaluator(plan, samples))[:survivors]
        return pool[0]

    def _mutated(
        self, skipped: frozenset[Sublayer], free: tuple[Sublayer, ...], rng: random.Random
    ) -> frozenset[Sublayer]:
        times = min(rng.randint(1, self.switches), rng.randint(1, self.switches))
        for _ in range(times):
            back = rng.choice(sorted(skipped))
            others = [
                s for s in free if s not in skipped and (s.kind == back.kind or not self.same_kind)
            ]
            if others:
                skipped = (skipped - {back}) | {rng.choice(others)}
        return skipped

    def _candidate(self, profile: Profile, skip: frozenset[Sublayer]) -> SkipPlan:
        return candidate(profile, skip, self.fit_surrogates, self.scaled)
