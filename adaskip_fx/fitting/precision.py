"""Coarser products where nothing notices: while choosing and while descending."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allow_tf32() -> Iterator[None]:
    """Meanwhile float32 products may be rounded to TF32, where a GPU has that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
