"""Symbols that a piece's inputs are described by, and those that are inputs themselves."""

from __future__ import annotations

from typing import Any

import torch

from adaskip_passes.partition.outer import Piece


def missing_symbols(piece: Piece) -> set[str]:
    """Those that some input depends on and no input is."""
    inputs = [n.meta["example_value"] for n in piece.module.graph.find_nodes(op="placeholder")]
    given = {v.node.expr for v in inputs if isinstance(v, torch.SymInt)}
    needed: set[Any] = set()
    for value in inputs:
        numbers = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for number in numbers:
            if isinstance(number, torch.SymInt):
                needed |= number.node.expr.free_symbols
    return {str(s) for s in needed - given}
