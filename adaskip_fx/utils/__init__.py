"""Small helpers that know nothing of models: files written atomically, progress on a terminal.

Imports nothing of this package.
"""
