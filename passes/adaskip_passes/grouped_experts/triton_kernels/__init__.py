"""Triton kernels for `ops`, on CUDA: each number is read once, in accesses of 16 bytes."""

from .rows import gates, gathering, sums

__all__ = ["gates", "gathering", "sums"]
