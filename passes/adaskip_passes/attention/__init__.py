"""Operators of attention over prompts: on a filled cache (`ops.attend_causal`), and packed.

Their reference implementations are plain torch; :mod:`.cuda_kernels` compute them with PyTorch's
fused kernels.
"""

from . import cuda_kernels as cuda_kernels
