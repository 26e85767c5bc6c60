"""Mixers with a state over prompts: Mamba's scans and delta rules in chunks, any length alike.

What depends on the number of tokens is written with matrix products over all chunks at once; what
one chunk hands on to the next is an operator of :mod:`.carry`. Imports `tracing`.
"""
