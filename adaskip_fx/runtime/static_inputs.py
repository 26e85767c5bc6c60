"""What a step on a static cache is handed, in tensors that stay where they are.

Where a step goes on from the last one, positions have been counted on the device, and only tokens
are written; where it does not (drafts were rejected), one kernel sets what is counted.
"""

from __future__ import annotations

import torch

from ..kv_cache.padding import Padding

_ALIGNED = 16  # bytes, at which compiled code expects its inputs


class StaticInputs:
    """The inputs of steps of some new tokens a row.

    Attributes:
        tokens: int64 [B, T].
        positions: of the new tokens, int64 [B, T].
        position: tokens stored before them, int64 [B].
        first: tokens of padding that a row begins with, int64 [B].
        valid: which new tokens count for the probes, bool [B, T].
    """

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        """Make the inputs of steps of `tokens` new tokens of each of `batch` rows."""
        size = batch, tokens
        with torch.inference_mode(False):
            self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
            self.first = torch.zeros(batch, dtype=torch.int64, device=device)
            self.valid = torch.ones(size, dtype=torch.bool, device=device)
            # what is counted is one tensor, in parts that are aligned
            order = torch.arange(tokens, device=device).repeat(batch)
            begin = -(-order.nbytes // _ALIGNED) * _ALIGNED // order.itemsize
            self._since = torch.zeros(begin + batch, dtype=torch.int64, device=device)
            self._since[: len(order)] = order
            self._counted = self._since.clone()
        self.positions = self._counted[: len(order)].view(size)
        self.position = self._counted[begin:]
        self._position_at: int | None = 0  # what `position` holds, if that is known
        self._positions_at: int | None = 0  # likewise `positions`
        self._padding: Padding | None = None  # what `first` holds
        self._all_valid = True  # what `valid` holds

    def all(self) -> list[torch.Tensor]:
        """Return the tensors that hold them."""
        return [self.tokens, self._counted, self._since, self.first, self.valid]

    def write(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        length: int,
        padding: Padding | None,
        valid: torch.Tensor | None,
    ) -> None:
        """Write the inputs of the next step; arguments as of `StaticStep.run`."""
        self._new(self.tokens, input_ids).copy_(input_ids, non_blocking=True)
        self._write_positions(input_ids.shape[1], position_ids, length)
        if padding is not self._padding:
            self.first.copy_(padding.first) if padding is not None else self.first.zero_()
            self._padding = padding
        if valid is not None:
            self.valid.copy_(valid)
            self._all_valid = False
        elif not self._all_valid:
            self.valid.fill_(True)
            self._all_valid = True

    def _write_positions(self, new: int, given: torch.Tensor | None, length: int) -> None:
        counted = given is None and new == self.positions.shape[1]
        if self._position_at != length or (given is None and self._positions_at != length):
            torch.add(self._since, length, out=self._counted)
        if given is not None:
            self._new(self.positions, given).copy_(given)
            self.positions[:, new:] = given[:, -1:]  # what is no token makes none longer
        elif not counted:
            self.positions[:, new:] = length + new - 1
        # until the step is through
        self._position_at = self._positions_at = None

    def count(self) -> None:
        """Count on, on the device: this is part of a step."""
        self._counted.add_(self.tokens.shape[1])

    def counted(self, length: int, as_written: bool) -> None:
        """Take note that a step is through.

        Args:
            length: tokens stored with those of the step.
            as_written: whether its positions were those after the last, of all its tokens.
        """
        self._position_at = length
        self._positions_at = length if as_written else None

    @staticmethod
    def _new(buffer: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return the part of an input that is given."""
        new = given.shape[1]
        return buffer if new == buffer.shape[1] else buffer[:, :new]
