"""Says which piece a node belongs to, and cuts a graph into an outer graph of calls to pieces.

Imports `normalize`, `infra` and `analysis`.
"""
