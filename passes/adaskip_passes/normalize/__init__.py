"""Brings every way of adding to the residual stream into one form.

Imports `analysis`.
"""
