"""The compiled model as transformers sees it, its `generate`, and loading a model by name.

Imports `runtime` and what lies below it.
"""
