"""Experts of many tokens, which are sorted by expert: what is done beside the grouped products.

The operators of :mod:`.ops` are what captured prompts call on CUDA. Imports `decode`.
"""

from . import cuda_kernels as cuda_kernels
