"""From a transformers model to a checked graph of each phase, and the Python state it holds for.

Imports `kv_cache`, `plans` and `adaskip_passes`.
"""
