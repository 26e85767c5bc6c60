"""What makes a decode step fast on a GPU: fused projections, attention over the filled part of a
cache, CUDA graphs.

Imports `transforms` and `analysis`.
"""
