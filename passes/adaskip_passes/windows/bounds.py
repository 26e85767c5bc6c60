"""Windows on a static cache: columns of the table of bounds that decode attention reads."""

from __future__ import annotations

import torch

from ..decode.ops import Bounds


def narrowed(bounds: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return a table of bounds for each of several layers: their windows, where those are smaller.

    Args:
        bounds: Of the model, [B, 1 or H_kv, 1, 5]; see `Bounds`.
        tables: Sinks and tokens, int64 [L, H_kv, 2], on the same device.

    Returns:
        [L, B, H_kv, 1, 5].

    """
    layers, heads = tables.shape[:2]
    shape = layers, bounds.shape[0], heads, 1
    sinks, tokens = (column.reshape(layers, 1, heads, 1) for column in tables.unbind(-1))
    columns = list(bounds.unbind(-1))
    columns[Bounds.SINKS] = torch.maximum(columns[Bounds.SINKS], sinks)
    columns[Bounds.WINDOW] = torch.minimum(columns[Bounds.WINDOW], tokens)
    return torch.stack([column.expand(shape) for column in columns], -1)
