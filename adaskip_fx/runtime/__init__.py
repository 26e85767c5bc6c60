"""A request, from its first token to its last: prompts, decode steps, what is learned on the way.

Imports `programs`, `policies` and what lies below them.
"""
