"""The name of a sublayer, as plans, profiles and tables use it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

Kind = Literal["attention", "ffn", "mixer"]

_NAME = re.compile(r"(0|[1-9][0-9]*)\.(" + "|".join(get_args(Kind)) + ")")


@dataclass(frozen=True, order=True, slots=True)
class Sublayer:
    """One residual branch `x -> x + f(norm(x))` of a decoder layer.

    Attributes:
        layer: counted from 0.
        kind: attention, ffn or mixer.

    Raises:
        ValueError: a negative layer, or an unknown kind.
    """

    layer: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.layer < 0 or self.kind not in get_args(Kind):
            raise ValueError(f"no such sublayer: layer {self.layer!r}, kind {self.kind!r}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Sublayer:
        """Return the sublayer that is written as `"3.attention"`, the form of `str()`.

        Raises:
            ValueError: any other text.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a sublayer: write LAYER.KIND with KIND one of "
                f"{', '.join(get_args(Kind))}, for example '3.attention'"
            )
        return cls(int(match[1]), cast(Kind, match[2]))
