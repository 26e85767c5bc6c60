"""Facts about a graph, which is only read: effects, residual branches, lengths, equal structure.

Imports only `errors`.
"""
