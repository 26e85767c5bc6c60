"""Passes over an outer graph of pieces, and what runs them.

Imports `partition` and `analysis`.
"""
