"""The texts of fits on a model with three layers, and what is skipped in it."""

from __future__ import annotations

TEXTS = tuple(f"{word} " * 30 for word in ("alpha", "beta", "gamma", "delta", "eta", "theta"))
LIMIT = 80
SKIPPED = ("0.ffn", "1.attention", "2.ffn")
