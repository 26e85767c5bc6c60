"""Texts that come with Python or with this package, to calibrate, measure and fit on.

Imports nothing of this package.
"""
