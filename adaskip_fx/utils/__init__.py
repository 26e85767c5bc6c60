"""Small helpers that know nothing of this package.

Files written atomically, progress on a terminal; what torch and transformers do not promise
(`torch_internals`, `transformers_internals`), and types of transformers' objects.

Imports nothing of this package.
"""
