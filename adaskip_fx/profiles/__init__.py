"""Profiles: what calibration measured on a model, and the model's fingerprint.

Imports `plans` and `utils`.
"""
