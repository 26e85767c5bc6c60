"""Plans: what is skipped in which phase, and the surrogates of it; as values and as files.

A plan knows nothing of a model but its sublayers. Imports `utils`; no transformers.
"""
