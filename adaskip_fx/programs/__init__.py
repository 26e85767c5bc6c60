"""From a captured graph and a plan to a program that runs, kept for the next request.

Imports `capture` and what lies below it.
"""
