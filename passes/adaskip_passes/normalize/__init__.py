"""Passes over a captured graph that bring every way of adding to the residual stream into one form.

Imports `infra` and `analysis`.
"""
