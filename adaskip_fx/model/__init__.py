"""The face that transformers sees: a compiled model, its `generate`, and loading by name.

Imports `runtime` and what lies below it.
"""
