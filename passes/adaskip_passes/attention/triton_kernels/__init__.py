"""Triton kernels of attention over prompts; imported on CUDA alone."""
