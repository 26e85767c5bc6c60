"""SWIFT's search: sets of sublayers at random, and now and then by what others have come to.

Xia et al. 2024, "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration", arXiv
2410.06916, section 4.1. As many sublayers are left out as the plan leaves out that is refined; the
set of the greatest matchness stays. Of every `every` candidates one is by Bayesian optimisation: a
Gaussian process over sets, and of many sets that of the greatest expected improvement.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, exp, pi, sqrt

import numpy as np
import numpy.typing as npt

from ..plans.skip_plan import SkipPlan
from ..plans.sublayer import Sublayer
from .refinement import Space

_Array = npt.NDArray[np.float64]
_Set = frozenset[Sublayer]
_KNOWN = 256  # measured sets that a guess is made of
_GUESSED = 256  # sets of which the most promising one is taken
_NOISE = 0.05**2  # of a matchness, whose text is another each time


@dataclass(frozen=True)
class Swift:
    """Refine by SWIFT's search; its defaults are those of the authors' released script for 7B.

    Attributes:
        enough: The matchness at which the search ends.
        steps: Candidates at most.
        patience: Candidates in a row that were no better, at which it ends as well.
        every: Of so many candidates one is by Bayesian optimisation.
        seed: Of what is drawn.

    Raises:
        ValueError: A number means nothing.
    """

    enough: float = 0.93
    steps: int = 1000
    patience: int = 300
    every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.enough <= 1:
            raise ValueError(f"Swift(enough=...) must be above 0 and at most 1: {self.enough!r}")
        for name in ("steps", "patience", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Swift({name}=...) must be at least 1: {getattr(self, name)!r}")

    def begin(self, space: Space) -> SwiftSearch:
        """Return a new search."""
        return SwiftSearch(self, space)


class SwiftSearch:
    """The search of one model.

    Attributes:
        best: the greatest matchness; None before the first.
        tried: how many sets were measured.
    """

    def __init__(self, options: Swift, space: Space) -> None:
        """Begin with the plan that is to be refined."""
        self.best: float | None = None
        self.tried = 0
        self._options, self._space, self._since = options, space, 0
        self._random = random.Random(options.seed)
        self._plan = space.plan
        skipped = frozenset(space.plan.skipped("decode"))
        self._set, self._next, self._count = skipped, skipped, len(skipped)
        self._known = list[tuple[_Set, float]]()

    def plan(self, stored: int) -> SkipPlan:
        """Return the plan of the greatest matchness."""
        return self._plan

    def candidate(self) -> SkipPlan | None:
        """Return the plan of another set; the first is the one that is refined."""
        options, best = self._options, self.best
        over = self.tried >= options.steps or self._since >= options.patience
        if over or (best is not None and best >= options.enough) or not self._count:
            return None
        if self.tried == 0:
            return self._space.plan
        guess = self.tried % options.every == 0
        self._next = self._promising() if guess else self._drawn()
        return self._space.skipping(self._next)

    def measured(self, plan: SkipPlan, matchness: float) -> None:
        """Take the matchness of the last candidate."""
        self.tried, self._since = self.tried + 1, self._since + 1
        self._known = [*self._known, (self._next, matchness)][-_KNOWN:]
        if self.best is None or matchness > self.best:
            self.best, self._plan, self._set, self._since = matchness, plan, self._next, 0

    def _drawn(self) -> _Set:
        count = min(self._count, len(self._space.skippable))
        return frozenset(self._random.sample(self._space.skippable, count))

    def _promising(self) -> _Set:
        """Return the set that promises the greatest improvement: drawn, or near the best one."""
        sets = [self._drawn() for _ in range(_GUESSED // 2)]
        sets += [self._neighbour() for _ in range(_GUESSED // 2)]
        known, values = zip(*self._known, strict=True)
        means, deviations = posterior(self._rows(known), np.asarray(values), self._rows(sets))
        best = max(values)
        gains = [improvement(m - best, d) for m, d in zip(means, deviations, strict=True)]
        return sets[int(np.argmax(gains))]

    def _neighbour(self) -> _Set:
        """Return the best set with one of its sublayers exchanged."""
        others = [s for s in self._space.skippable if s not in self._set]
        if not others:
            return self._set
        gone = self._random.choice(sorted(self._set))
        return (self._set - {gone}) | {self._random.choice(others)}

    def _rows(self, sets: Sequence[_Set]) -> _Array:
        sublayers = self._space.plan.sublayers
        return np.array([[float(s in chosen) for s in sublayers] for chosen in sets])


def posterior(known: _Array, values: _Array, asked: _Array) -> tuple[_Array, _Array]:
    """Return mean and deviation [m] of a Gaussian process at sets `asked` [m, S].

    Args:
        known: sets as rows of 0 and 1, [n, S].
        values: what was measured of each, [n].
        asked: sets, likewise [m, S].
    """
    scale = max(float(known.sum(1).mean()), 1.0)  # sublayers apart at which sets are hardly alike
    spread = max(float(values.var()), _NOISE)

    def alike(a: _Array, b: _Array) -> _Array:
        apart = np.abs(a[:, None] - b[None]).sum(-1)
        return np.asarray(spread * np.exp(-apart / scale))

    inverse = np.linalg.inv(alike(known, known) + _NOISE * np.eye(len(known)))
    near = alike(asked, known)
    mean = values.mean() + near @ inverse @ (values - values.mean())
    variance = spread - np.einsum("mn,nk,mk->m", near, inverse, near)
    return mean, np.sqrt(np.clip(variance, 1e-12, None))


def improvement(gain: float, deviation: float) -> float:
    """Return the expected improvement of a normal variable whose mean is `gain` above the best."""
    z = gain / deviation
    return gain * 0.5 * (1 + erf(z / sqrt(2))) + deviation * exp(-0.5 * z * z) / sqrt(2 * pi)
