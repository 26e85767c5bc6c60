"""What calibration measured on a model, and the fingerprint that says of which model.

Imports `plans` and `utils`.
"""
