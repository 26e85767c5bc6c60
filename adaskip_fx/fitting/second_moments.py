"""What a fit needs of the calibration: second moments, whose size does not depend on its length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaskip_fx.plans.surrogate import EPS


@dataclass
class SecondMoments:
    """Sums over tokens of a stream x before a sublayer and what is to be added to it there, t.

    Each token counts with weight 1 / |x|^2: the norm before the next sublayer divides by |x|, so an
    error matters in proportion to it, and the first tokens of a text, whose streams are hundreds of
    times larger, do not decide alone. A token whose stream is zero counts for nothing.

    Attributes:
        inputs: sum of w z z^T, float64 [H + 1, H + 1], where z is x (or x / rms(x)) and a last 1.
        products: sum of w z t^T, float64 [H + 1, H].
        targets: sum of w t . t.
        counted: how many tokens count, int64 on the device.
        normalized: whether z is x / rms(x).
    """

    inputs: torch.Tensor
    products: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor
    normalized: bool = False

    @classmethod
    def zeros(cls, hidden: int, device: torch.device, normalized: bool = False) -> SecondMoments:
        """Of no tokens."""
        shapes = ((hidden + 1, hidden + 1), (hidden + 1, hidden), ())
        made = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)
        inputs, products, targets = made
        counted = torch.zeros((), dtype=torch.int64, device=device)
        return cls(inputs, products, targets, counted, normalized)

    @property
    def hidden(self) -> int:
        """H."""
        return self.products.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens count; waits for the device."""
        return int(self.counted)

    def add(self, stream: torch.Tensor, target: torch.Tensor) -> None:
        """Count tokens.

        Args:
            stream: what the surrogate will be given, [..., H].
            target: what the stream is to be after it, [..., H].
        """
        x, y = (t.reshape(-1, self.hidden).to(torch.float64) for t in (stream, target))
        norm, wanted = (t.norm(dim=-1, keepdim=True) for t in (x, y))
        # a padding token's embedding may be zero, a stream in float16 infinite
        counts = (norm > 0) & norm.isfinite() & wanted.isfinite()
        x, y = (torch.where(counts, t, 0.0) for t in (x, y))  # NaN times a weight of 0 is NaN
        weight = torch.where(counts, 1 / norm, 0.0)
        given = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() if self.normalized else x
        z = torch.cat((given, torch.ones_like(x[:, :1])), 1) * weight
        t = (y - x) * weight
        self.inputs += z.T @ z
        self.products += z.T @ t
        self.targets += t.square().sum()
        self.counted += counts.sum()

    def plus(self, other: SecondMoments, times: int = 1) -> SecondMoments:
        """Of the tokens of both."""
        return SecondMoments(
            self.inputs + times * other.inputs,
            self.products + times * other.products,
            self.targets + times * other.targets,
            self.counted + times * other.counted,
            self.normalized,
        )

    def minus(self, part: SecondMoments) -> SecondMoments:
        """Without the tokens of a part."""
        return self.plus(part, -1)
