"""Compiles pieces, and links them into a program for one plan.

Imports everything below it.
"""
