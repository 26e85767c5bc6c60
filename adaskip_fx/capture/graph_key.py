"""The key of a captured graph: everything that it depends on besides lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from .batch_sizes import BatchSizes

GraphPhase = Literal["prefill", "extend", "decode"]


@dataclass(frozen=True)
class GraphKey:
    """All that a captured graph depends on besides lengths.

    Attributes:
        phase: which of the three graphs.
        batch: for how many rows.
        one_token: a step of one token (a length of one is never symbolic).
        one_stored: that token is the first one.
        masked: the step has a 2D attention mask.
        last_logits: forward gives the logits of the last token alone, or has no say in it; if not,
            of the tokens that an index tensor names (of all where forward takes no tensor).
        dtype, device: of the model's floating point parameters.
        surroundings: torch's defaults and autocast where the model is called.
        static_tokens: new tokens of each row where K/V are whole buffers and positions are on the
            device, so that every step works at the same addresses; 0 for views of what is filled.
        whole: on a static cache, whether the graph may read all of a buffer, filled or not.
        by_head: whether the K/V heads of a layer lie apart.
        embedded: tokens are given by their embeddings, not by ids.
        axes: that positions have besides rows and tokens; 0 for [B, T].
        packed: a prompt's rows without padding, one after the other in one (so `batch` is 1 alone).
    """

    phase: GraphPhase
    batch: BatchSizes
    one_token: bool
    one_stored: bool
    masked: bool
    last_logits: bool
    dtype: torch.dtype
    device: torch.device
    surroundings: Surroundings
    static_tokens: int = 0
    whole: bool = False
    by_head: bool = False
    embedded: bool = False
    packed: bool = False
    axes: int = 0

    @property
    def static_cache(self) -> bool:
        """Whether K/V are whole buffers."""
        return self.static_tokens > 0

    @classmethod
    def plain(cls, phase: GraphPhase, dtype: torch.dtype, device: torch.device) -> GraphKey:
        """Return the key of one row without a mask whose last token's logits are wanted."""
        return cls(
            phase,
            BatchSizes.only(1),
            one_token=phase == "decode",
            one_stored=False,
            masked=False,
            last_logits=True,
            dtype=dtype,
            device=device,
            surroundings=Surroundings.now(device),
        )

    def of_rows(self, rows: int) -> GraphKey:
        """Return the key of a graph for so many rows alone."""
        return replace(self, batch=BatchSizes.only(rows))


@dataclass(frozen=True)
class Surroundings:
    """State of torch that a model's code runs in, and a captured graph depends on.

    Attributes:
        autocast: the dtype of an active autocast region; None outside of one.
        dtype: of floating point tensors that are made without one.
        device: of tensors that are made without one.
    """

    autocast: torch.dtype | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> Surroundings:
        """Return torch's state now, for code that runs on a device."""
        active = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if active else None
        made = torch.empty(0)  # (asking for the defaults by name takes several times as long)
        return cls(autocast, made.dtype, made.device)
