"""How projections are cut into programs. The sizes were chosen on an H200."""

from __future__ import annotations

import triton


def row_blocks(width: int, outputs: int, gated: bool) -> tuple[int, int, int, int]:
    """Return outputs a program, columns at a time, warps and stages, for one row."""
    few = outputs <= 4608
    if gated:
        bn, bk, warps = 2, 1024, 4
    elif width > 8192 or (few and width > 4096):
        bn, bk, warps = 2, 2048, 4
    elif outputs > 32768:
        bn, bk, warps = 4, 2048, 8
    elif outputs <= 1024:
        bn, bk, warps = 4, 2048, 2 if width > 1024 else 1
    elif width < 4096:
        bn, bk, warps = 4, 1024, 2 if outputs > 8192 and width % 1024 else 4
    elif few:
        bn, bk, warps = 2, 2048, 8
    else:
        bn, bk, warps = 4, 512, 2
    return bn, min(bk, triton.next_power_of_2(width)), warps, 1


def rows_blocks(width: int, outputs: int, gated: bool, rows: int) -> tuple[int, int, int, int]:
    """Return the same for several rows."""
    many = rows > 16
    if gated:
        if many:
            return 64, 128, 4, 3
        return (32, 64, 4, 6) if width <= 1024 and outputs <= 4096 else (32, 256, 4, 3)
    if outputs > 32768:
        return 32, 256, 2, 3
    if outputs > 4096:
        return (16, 256, 2, 4) if many else (16, 512, 2, 3)
    if many:
        return 32, 512, 4, 3
    if outputs <= 1024:
        return (16, 128, 2, 6) if width <= 1024 else (16, 512, 2, 3)
    if outputs <= 2048 and width >= 4096:
        return 16, 512, 2, 6
    return 32, 512, 2 if width <= 2048 else 4, 4
