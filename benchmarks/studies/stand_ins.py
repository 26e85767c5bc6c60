"""Low-rank maps that stand in for what a window hides, fitted in closed form.

At a token that a window hides something from, a map of the sublayer's normalised input, or of what
its windowed attention adds, is added to the latter. It is the reduced-rank ridge regression of what
full attention would add on top (Izenman 1975), with a constant that is not regularized; rank 0 is
the constant alone. All tokens count alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Reads = Literal["input", "output"]
RIDGE = 1e-3  # in units of the mean variance of a channel


@dataclass(frozen=True)
class Kind:
    """What stands in.

    Attributes:
        rank: Of the map; 0 for a constant.
        reads: The sublayer's normalised input, or the output of its windowed attention.
        refined: Whether it is distilled after the closed form.
    """

    rank: int = 0
    reads: Reads = "input"
    refined: bool = False

    def __str__(self) -> str:
        named = f"{self.reads} {self.rank}" if self.rank else "constant"
        return f"{named} refined" if self.refined else named

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Return the kind of a name, ``constant``, ``input 32`` or ``output 8 refined``.

        Raises:
            ValueError: No kind has this name; says how names are made.
        """
        words = text.split()
        refined = words[1:] != [] and words[-1] == "refined"
        match words[:-1] if refined else words:
            case ["constant"]:
                return cls(refined=refined)
            case ["input" | "output" as reads, rank] if rank.isdecimal() and int(rank):
                return cls(int(rank), reads, refined)
        raise ValueError(
            f"no stand-in is named {text!r}: write 'constant', 'input RANK' or 'output RANK' with "
            "a rank from 1 on, and 'refined' after it to distil it"
        )


@dataclass(frozen=True, eq=False)
class StandIn:
    """A map, ``up (down x) + bias``.

    Attributes:
        reads: What x is; see `Kind`.
        down, up, bias: Float32 [r, I], [H, r] and [H].
    """

    reads: Reads
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added, float32 [..., H], of x [..., I]."""
        return (x.float() @ self.down.T) @ self.up.T + self.bias


def fitted(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], kind: Kind, ridge: float = RIDGE
) -> StandIn:
    """Return the map with the least squared error.

    The best map of a rank is the full regression F, projected onto the leading eigenvectors of
    F^T C F, where C is the covariance of x with the ridge on its diagonal.

    Args:
        pairs: Some tokens' x [n, I] and what is to be added there [n, H], of any floating dtype;
            at least one token in all.
        kind: Of the map.
        ridge: In units of the mean variance of a channel of x.
    """
    count, (x_sum, t_sum, squares, products) = _moments(pairs)
    x_mean, t_mean = x_sum / count, t_sum / count
    covariance = squares / count - torch.outer(x_mean, x_mean)
    diagonal = covariance.diagonal()
    diagonal += ridge * diagonal.mean() + torch.finfo(torch.float32).tiny
    full = torch.linalg.solve(covariance, products / count - torch.outer(x_mean, t_mean))
    vectors = torch.linalg.eigh(full.T @ covariance @ full).eigenvectors  # the leading are last
    up = vectors[:, max(0, vectors.shape[1] - kind.rank) :]
    down = (full @ up).T
    tensors = down, up, t_mean - up @ (down @ x_mean)
    return StandIn(kind.reads, *(t.float().contiguous() for t in tensors))


def _moments(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Return how many tokens there are, and float64 sums of x, t, x x^T and x t^T."""
    count, sums = 0, tuple[torch.Tensor, ...]()
    for x, t in pairs:
        x, t = x.double(), t.double()
        more = x.sum(0), t.sum(0), x.T @ x, x.T @ t
        sums = tuple(a + b for a, b in zip(sums, more, strict=True)) if sums else more
        count += len(x)
    return count, sums
