"""Measurements of a model on texts: a profile of its sublayers, and the loss of a plan.

Imports `api` and what lies below it.
"""
