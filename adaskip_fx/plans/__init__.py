"""What is skipped, in which phase, and what stands in for it; as values and as files.

A plan says nothing of a model but which sublayers it has. Imports `utils`; no transformers.
"""
