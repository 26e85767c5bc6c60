"""Windows: what attention that runs sees, by layer and by K/V head.

The pass :class:`~.window_attention.WindowAttention` gives them to pieces of an outer graph; the
operators of :mod:`.ops` are what it calls in prompts. On a static cache a window is a column of the
table of bounds that decode attention reads. Imports `attention`, `decode` and `partition`.
"""

from . import cuda_kernels as cuda_kernels
