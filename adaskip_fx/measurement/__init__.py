"""Times a device: a step, a plan, and every sublayer for a latency table.

Imports `runtime` and `latency`, and what lies below them.
"""
