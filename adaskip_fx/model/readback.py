"""What the host has to know of a step, on its way there while the device goes on."""

from __future__ import annotations

import torch

from ..utils.transformers_types import Streamer


class Readback:
    """A step's tokens, and whether they end the request."""

    def __init__(
        self, input_ids: torch.Tensor, streamer: Streamer | None, ends: frozenset[int] | None
    ) -> None:
        """Make room for a token of each row.

        Args:
            input_ids: the prompt, int64 [B, T].
            streamer: who is handed the tokens, if anybody is.
            ends: the tokens that end a request of one row, where nothing else does; None where
                the device tells whether to stop.
        """
        on_gpu, rows = input_ids.device.type == "cuda", input_ids.shape[0]
        self._streamer, self._ends = streamer, ends
        self._flags = torch.zeros(2, dtype=torch.bool, pin_memory=on_gpu, device="cpu")
        self._tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
        self._copied = torch.Event(input_ids.device) if on_gpu else None
        self._known: tuple[bool, bool] | None = None

    def send(
        self, tokens: torch.Tensor, stop: torch.Tensor | None, invalid: torch.Tensor | None
    ) -> None:
        """Begin to copy.

        Args:
            tokens: int64 [B].
            stop: bool []; None where the host sees it from the tokens.
            invalid: whether they could not be drawn, bool []; None where that cannot be.
        """
        if stop is not None:
            flags = torch.stack((stop, invalid if invalid is not None else torch.zeros_like(stop)))
            self._flags.copy_(flags, non_blocking=True)
        elif invalid is not None:
            self._flags[1:].copy_(invalid.view(1), non_blocking=True)
        if self._streamer is not None or stop is None:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def know(self, stop: bool, invalid: bool) -> None:
        """Take what would have been sent of a step, since the host has read it with its tokens."""
        self._known = stop, invalid

    def receive(self) -> tuple[bool, bool]:
        """Wait for what was sent last, and stream the tokens; returns (stop, invalid).

        Who has the host `know` it streams them by itself.
        """
        if self._known is not None:
            known, self._known = self._known, None
            return known
        if self._copied is not None:
            self._copied.synchronize()
        stop, invalid = self._flags.tolist()
        if self._ends is not None:
            stop = self._tokens.tolist()[0] in self._ends
        if self._streamer is not None and not invalid:
            self._streamer.put(self._tokens.clone())
        return stop, invalid
