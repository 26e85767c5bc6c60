"""An upper bound of a sum of which only some terms are seen, valid at every time at once.

Terms x(1), x(2), ... in [0, m] are fixed one after the other, each before a coin of its own is
tossed; with probability s(i) it is seen. Y(i) = x(i) / s(i) where it is seen, and else 0, has the
mean x(i), whatever came before. For predictable guesses G(i) (each made of what came before),
V(t) = sum over i <= t of ((Y(i) - G(i)) / B)^2 with B >= m / s(i), and any 0 < a < 1,

    P(there is a t with sum x(i) - sum Y(i) >= B (log(1 / error) + psi(a) V(t)) / a) <= error,
    psi(a) = -log(1 - a) - a,

since exp(a S - psi(a) V) with S = sum (x(i) - Y(i)) / B is a supermartingale (an empirical-
Bernstein confidence sequence: Howard, Ramdas, McAuliffe and Sekhon 2021, arXiv 1810.08240, theorem
4 with linear boundaries; Waudby-Smith and Ramdas 2024, arXiv 2010.09686, section 3.2). Of J values
of a, each with error / J, the least bound holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Values of a: the smaller, the better with many terms that vary.
_SLOPES = tuple(0.95 * 0.55**i for i in range(8))


@dataclass
class UpperBound:
    """The bound of one sum; see above.

    Attributes:
        most: m / s of the least s, which is B.
        error: how likely the sum may be above the bound, at any time.
        terms: how many there were.
        estimate: sum of Y.
        variance: V.
    """

    most: float
    error: float
    terms: int = 0
    estimate: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Count Y of another term.

        Raises:
            ValueError: it is not within 0 and `most`.
        """
        if not 0 <= value <= self.most * (1 + 1e-9):
            raise ValueError(f"a term must be within 0 and {self.most:g}, got {value!r}")
        guess = self.estimate / (self.terms + 1)
        self.variance += ((value - guess) / self.most) ** 2
        self.estimate += value
        self.terms += 1

    @property
    def radius(self) -> float:
        """How far the sum may be above its estimate."""
        if not self.terms:
            return 0.0
        log = math.log(len(_SLOPES) / self.error)
        bounds = ((log + psi(a) * self.variance) / a for a in _SLOPES)
        return self.most * min(bounds)

    @property
    def upper(self) -> float:
        """The bound of the sum of all terms, seen or not."""
        return self.estimate + self.radius


def psi(a: float) -> float:
    """Return -log(1 - a) - a."""
    return -math.log1p(-a) - a
