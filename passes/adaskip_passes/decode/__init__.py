"""For a decode step on a GPU: fused operators with their kernels, and recorded CUDA graphs.

The operators are registered when anything here is imported, and so are their kernels for CUDA.
Imports `transforms`, `infra` and `analysis`.
"""

from . import cuda_kernels as cuda_kernels
