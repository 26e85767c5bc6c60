"""Small helpers that know nothing of this package.

Files written atomically, progress on a terminal; what torch and transformers do not promise
(`torch_internals`, `transformers_internals`, `generation_internals`, `expert_internals`), types of
transformers' objects, results kept as long as what they are of (`weak_cache`), and how much is kept
for later (`memory_budget`).

Imports nothing of this package.
"""
