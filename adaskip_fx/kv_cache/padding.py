"""Rows that begin with padding: how much of each, which is all that attention has to know."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Answer:
    """A yes or no that the device will have found; the host need not wait for it at once.

    Attributes:
        value: a bool on the host, once it is there.
        event: when it is there; None if it is.
    """

    value: torch.Tensor
    event: torch.cuda.Event | None

    @classmethod
    def of(cls, value: torch.Tensor) -> Answer:
        """Have a bool tensor [] brought to the host, after what the device has to do before."""
        if value.device.type != "cuda":
            return cls(value, None)
        held = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        held.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(value.device))
        return cls(held, event)

    def __bool__(self) -> bool:
        """Wait for it."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.value)


@dataclass(frozen=True, eq=False)
class Padding:
    """Rows of which the first tokens are padding, and no others.

    Attributes:
        first: each row's first token that is not, int64 [B], on the device.
        counts: the same numbers, on the host.
    """

    first: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, mask: torch.Tensor) -> Padding | None:
        """Return what a mask [B, S] says; None where it is 0 anywhere else than at the left.

        The host reads it, once. Every row must have a token that is not padding.
        """
        kept = mask != 0
        first = kept.shape[1] - kept.sum(1)
        columns = torch.arange(kept.shape[1], device=mask.device)
        left = (kept == (columns >= first.unsqueeze(1))).all()
        *counts, regular = torch.cat((first, left.view(1).to(first.dtype))).tolist()
        if not regular or max(counts) == kept.shape[1]:
            return None
        return cls(first, tuple(counts))

    def says(self, mask: torch.Tensor) -> Answer:
        """Return whether a mask [B, S] says the same."""
        if mask.shape[0] != len(self.counts) or mask.shape[1] <= max(self.counts):
            return Answer(torch.tensor(False, device="cpu"), None)
        columns = torch.arange(mask.shape[1], device=mask.device)
        return Answer.of(((mask != 0) == (columns >= self.first.unsqueeze(1))).all())

    @property
    def any(self) -> bool:
        """Whether anything is padding at all."""
        return any(self.counts)


class LastMask:
    """The last mask of a request that was read, and what it said."""

    def __init__(self) -> None:
        """Begin with none."""
        self._trusted: torch.Tensor | None = None  # need not be read
        self._width = 0
        self._padding: Padding | None = None

    def padding(self, mask: torch.Tensor, suppose: bool) -> tuple[Padding | None, Answer | None]:
        """Return what a mask [batch, tokens] says, as `Padding.of` does: the host reads it.

        Not if it goes on from the last one that was read (`goes_on`). To `suppose` is to return
        what that one said, and whether this one says the same, which is not waited for.
        """
        padding, same = self._padding, None
        if self._trusted is not mask:
            same = padding.says(mask) if padding is not None else None
            if same is None or not (suppose or same):
                padding, same = Padding.of(mask), None
            self._trusted, self._width, self._padding = None, mask.shape[1], padding
        return padding, same if suppose else None

    def keep_first(self, tokens: int) -> None:
        """Forget what was said of tokens after the first ones: a row's padding is among these."""
        self._trusted = None
        if self._padding is None or tokens <= max(self._padding.counts):
            self._width, self._padding = 0, None
        self._width = min(self._width, tokens)

    def goes_on(self, mask: torch.Tensor | None) -> None:
        """Say that `mask` is the last one, with ones for tokens that are new."""
        if self._width and mask is not None and mask.shape[1] > self._width:
            self._trusted, self._width = mask, mask.shape[1]


def of_real_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the values of tokens that are none of padding, whose own mean nothing.

    Args:
        values: [B, T, ...].
        mask: [B, T], 0 at padding; None: all values are returned as they are.

    Returns:
        [1, N, ...]: row by row, as if they were one.
    """
    return values if mask is None else values[mask != 0].unsqueeze(0)
