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
        targets: sum of w t . t, float64 [].
        counted: how many tokens count, int64 [] on the device.
        normalized: whether z is x / rms(x).
    """

    inputs: torch.Tensor
    products: torch.Tensor
    targets: torch.Tensor
    counted: torch.Tensor
    normalized: bool = False

    @classmethod
    def zeros(cls, hidden: int, device: torch.device, normalized: bool = False) -> SecondMoments:
        """Return the moments of zero tokens.

        Args:
            hidden: H, the width of the stream.
            device: of the sums.
            normalized: whether z is x / rms(x).
        """
        shapes = ((hidden + 1, hidden + 1), (hidden + 1, hidden), ())
        inputs, products, targets = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes
        )
        counted = torch.zeros((), dtype=torch.int64, device=device)
        return cls(inputs, products, targets, counted, normalized)

    @property
    def hidden(self) -> int:
        """H, the width of the stream."""
        return self.products.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The sums themselves."""
        return self.inputs, self.products, self.targets, self.counted

    @property
    def tokens(self) -> int:
        """How many tokens count; reading it waits for the device."""
        return int(self.counted)

    def add(self, stream: torch.Tensor, target: torch.Tensor) -> None:
        """Count tokens.

        Args:
            stream: the input of the surrogate, [..., H].
            target: what the stream is to be after it, [..., H].
        """
        x, y = (t.reshape(-1, self.hidden).to(torch.float64) for t in (stream, target))
        norm, target_norm = (t.norm(dim=-1, keepdim=True) for t in (x, y))
        # a padding token's embedding may be zero, a stream in float16 infinite
        counts = (norm > 0) & norm.isfinite() & target_norm.isfinite()
        x, y = (torch.where(counts, t, 0.0) for t in (x, y))  # NaN times a weight of 0 is NaN
        weight = torch.where(counts, 1 / norm, 0.0)
        inputs = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() if self.normalized else x
        z = torch.cat((inputs, torch.ones_like(x[:, :1])), 1) * weight
        t = (y - x) * weight
        self.inputs += z.T @ z
        self.products += z.T @ t
        self.targets += t.square().sum()
        self.counted += counts.sum()

    def plus(self, other: SecondMoments, times: int = 1) -> SecondMoments:
        """Return the moments of the tokens of both, those of `other` counted `times` times."""
        return SecondMoments(
            self.inputs + times * other.inputs,
            self.products + times * other.products,
            self.targets + times * other.targets,
            self.counted + times * other.counted,
            self.normalized,
        )

    def minus(self, part: SecondMoments) -> SecondMoments:
        """Return the moments without the tokens of `part`, which were counted before."""
        return self.plus(part, -1)
