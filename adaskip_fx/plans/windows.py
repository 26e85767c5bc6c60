"""Windows: what the attention that runs sees of the tokens before, by layer and by K/V head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from adaskip_fx.plans.actions import Phase, PlanError
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.utils.files import JSON

__all__ = ["NO_WINDOWS", "Window", "Windows"]

_MOST = 2**31 - 1  # tokens: an int32 of a kernel


@dataclass(frozen=True, order=True)
class Window:
    """What an attention sublayer sees: the last tokens, and the first ones (attention sinks).

    The token at position t sees the one at j if ``t - tokens < j <= t`` or ``j < sinks``; positions
    are counted in each row from its first token that is no padding. (Xiao et al., "Efficient
    Streaming Language Models with Attention Sinks", section 3.) Keys keep the rotation of their own
    position.

    Attributes:
        tokens: How many of the last tokens are seen, the query's own among them; at least 1.
        sinks: How many of the first tokens are seen always.
        full_heads: The K/V heads that see everything all the same, in rising order.

    Raises:
        PlanError: A number is out of range, or a head is named twice.
    """

    tokens: int
    sinks: int = 4
    full_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                raise PlanError(
                    f"a window's {name} are an integer from {least} to {_MOST}, got {value!r}"
                )
        heads = tuple(self.full_heads)
        integers = all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads)
        if not integers or len(set(heads)) < len(heads):
            raise PlanError(f"full_heads are K/V heads from 0 on, each once, got {list(heads)}")
        object.__setattr__(self, "full_heads", tuple(sorted(heads)))

    def by_head(self, heads: int) -> list[tuple[int, int]]:
        """Return (sinks, tokens) of each of so many K/V heads; one that sees all has all tokens."""
        windowed = (self.sinks, self.tokens)
        return [(0, _MOST) if head in self.full_heads else windowed for head in range(heads)]

    def seen(self, length: int) -> int:
        """Return how many of `length` tokens the last of them sees, in a head that is windowed."""
        return min(length, self.tokens + self.sinks)

    def sees_within(self, other: Window) -> bool:
        """Return whether it sees nothing that `other` does not, at every length, in every head.

        That is so where its tokens and sinks are at most those of `other`, whose full heads include
        its own. More sinks never make up for fewer tokens: at a greater length they lie apart. How
        many heads a model has is not known here, so one head more is always taken to be windowed.
        """
        return (
            self.tokens <= other.tokens
            and self.sinks <= other.sinks
            and set(self.full_heads) <= set(other.full_heads)
        )

    def joined(self, other: Window) -> Window:
        """Return the widest window that sees nothing which one of the two does not.

        It may see less than what both see: at length 11 ``Window(3, 8)`` and ``Window(8, 3)`` see
        everything, and ``Window(3, 3)`` sees six tokens.
        """
        full = set(self.full_heads) & set(other.full_heads)
        sizes = min(self.tokens, other.tokens), min(self.sinks, other.sinks)
        return Window(*sizes, tuple(full))

    def __str__(self) -> str:
        """Return ``window 4+256``, with the heads that see all."""
        heads = ", ".join(map(str, self.full_heads))
        return f"window {self.sinks}+{self.tokens}{f' (K/V heads {heads} full)' if heads else ''}"

    def to_json(self) -> dict[str, JSON]:
        """Return the form in JSON."""
        return {"tokens": self.tokens, "sinks": self.sinks, "full_heads": list(self.full_heads)}


@dataclass(frozen=True)
class Windows:
    """The windows of a plan, in each phase. Immutable, equal by value.

    Attributes:
        prefill: Of attention sublayers in prompts; those that are missing see everything.
        decode: Likewise in decode.
    """

    prefill: Mapping[Sublayer, Window] = field(default_factory=dict)
    decode: Mapping[Sublayer, Window] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for phase in ("prefill", "decode"):
            given = {_parsed(s): window for s, window in getattr(self, phase).items()}
            ordered = {s: given[s] for s in sorted(given)}
            object.__setattr__(self, phase, MappingProxyType(ordered))

    @classmethod
    def of(
        cls, windows: Mapping[Sublayer, Window] | Iterable[Sublayer], window: Window | None = None
    ) -> Windows:
        """Return the same windows in both phases.

        Args:
            windows: A window for each sublayer, or the sublayers (which may be text,
                ``"3.attention"``) that have `window`.
            window: See there.
        """
        if window is not None:
            windows = dict.fromkeys(windows, window)
        assert isinstance(windows, Mapping), "a window for each sublayer, or one for all"
        return cls(windows, windows)

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)

    def __hash__(self) -> int:
        return hash((tuple(self.prefill.items()), tuple(self.decode.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy can be neither pickled nor deep-copied.
        return Windows, (dict(self.prefill), dict(self.decode))

    def of_phase(self, phase: Phase) -> Mapping[Sublayer, Window]:
        """Return the windows of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    def get(self, phase: Phase, sublayer: Sublayer) -> Window | None:
        """Return the window of `sublayer` in `phase`; None where it sees everything."""
        return self.of_phase(phase).get(sublayer)

    def renamed(self, names: Mapping[Sublayer, Sublayer]) -> Windows:
        """Return the windows of some sublayers, under other names."""
        phases = self.prefill, self.decode
        return Windows(*({names[s]: w for s, w in p.items() if s in names} for p in phases))

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The sublayers that have a window in some phase, in stream order."""
        return tuple(sorted({*self.prefill, *self.decode}))

    def to_json(self) -> dict[str, JSON]:
        """Return the form in JSON."""
        return {
            phase: {str(s): window.to_json() for s, window in windows.items()}
            for phase, windows in (("prefill", self.prefill), ("decode", self.decode))
        }

    @classmethod
    def from_json(cls, data: Any) -> Windows:
        """Return the windows that `to_json` wrote.

        Raises:
            ValueError: `to_json` does not write this.
        """
        if not isinstance(data, Mapping) or set(data) != {"prefill", "decode"}:
            raise ValueError("windows must be an object with prefill and decode")
        return cls(*({s: _window(w) for s, w in data[p].items()} for p in ("prefill", "decode")))


def _parsed(sublayer: Sublayer | str) -> Sublayer:
    if isinstance(sublayer, Sublayer):
        return sublayer
    try:
        return Sublayer.parse(sublayer)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _window(data: Any) -> Window:
    if not isinstance(data, Mapping) or set(data) != {"tokens", "sinks", "full_heads"}:
        raise ValueError("a window must be an object with tokens, sinks and full_heads")
    return Window(data["tokens"], data["sinks"], tuple(data["full_heads"]))


EVERYTHING = Window(_MOST, 0)  #: as good as no window
NO_WINDOWS = Windows()
