"""What a pass is, and the one manager that runs passes on captured, outer and piece graphs.

Imports `_torch` alone.
"""
