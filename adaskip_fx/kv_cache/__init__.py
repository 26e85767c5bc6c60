"""What a request remembers: buffers of keys, values and states, the cache that transformers sees
and the views of it that one step is given.

Imports `profiles`, `plans` and `utils`.
"""
