"""What a step is handed: new tokens, which of them count, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kv_cache.padding import Padding


class Inputs(NamedTuple):
    """New tokens of a request.

    Attributes:
        input_ids: int64 [B, T]; or embeddings [B, T, H] in their place.
        attention_mask: [B, stored + T], 0 at padding; None when there is none.
        position_ids: int64 [B or 1, T], or in axes [A, B or 1, T]; None for the tokens after the
            last.
        padding: what the mask says, if it is that rows begin with padding and no more.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    padding: Padding | None = None

    def check_positions(self) -> None:
        """ValueError for positions of another number of tokens."""
        batch, tokens = self.input_ids.shape[:2]
        given = self.position_ids
        if given is not None and (given.dim() not in (2, 3) or given.shape[-1] != tokens):
            raise ValueError(
                f"position_ids has shape {list(given.shape)}, expected [{batch}, {tokens}]"
            )

    @property
    def axes(self) -> int:
        """How many axes positions have besides rows and tokens."""
        given = self.position_ids
        return given.shape[0] if given is not None and given.dim() == 3 else 0

    def normal(self, past: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mask as bool, positions as int64 [(A,) B, T], contiguous: as they were captured.

        Args:
            past: tokens stored before these.
        """
        self.check_positions()
        batch, tokens = self.input_ids.shape[:2]
        positions, mask = self.position_ids, self.attention_mask
        if mask is not None:
            mask = mask.to(torch.bool).contiguous()
        if positions is None:
            new = torch.arange(past, past + tokens, device=self.input_ids.device)
            return mask, new.expand(batch, tokens).contiguous()
        shape = (*positions.shape[:-2], batch, tokens)
        return mask, positions.to(torch.int64).expand(shape).contiguous()

    def cut_last_token(self) -> tuple[Inputs | None, Inputs]:
        """A prompt in two: what is before its last token (None if nothing is), and that token.

        Of padded rows the last column is cut off: rows are padded on the left, as ``generate``
        needs them, so it holds every row's last token.
        """
        count = self.input_ids.shape[1]
        if count == 1:
            return None, self.cut([1])[0]
        head, tail = self.cut([count - 1, 1])
        return head, tail

    def cut(self, counts: Sequence[int]) -> tuple[Inputs, ...]:
        """The same tokens as steps one after the other, of `counts` tokens."""
        ids, mask, positions, padding = self
        self.check_positions()
        past = mask.shape[1] - ids.shape[1] if mask is not None else 0
        parts, end = list[Inputs](), 0
        for count in counts:
            begin, end = end, end + count
            parts.append(
                Inputs(
                    ids[:, begin:end].contiguous(),
                    None if mask is None else mask[:, : past + end],
                    None if positions is None else positions[..., begin:end],
                    padding,
                )
            )
        return tuple(parts)
