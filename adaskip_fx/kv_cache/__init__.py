"""What a request stores: its buffers, the cache that transformers sees, and the views of a step.

Imports `profiles`, `plans` and `utils`.
"""
