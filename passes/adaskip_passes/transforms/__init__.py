"""Passes over an outer graph of pieces, over one piece, and over the flat graph of all of them.

Imports `partition`, `infra` and `analysis`.
"""
