"""Models that transformers' tensor parallelism spreads over processes, the ranks.

What is sharded is followed (`shards`), ranks agree on what they run (`ranks`), and one that fails
or is gone is noticed by the others (`watch`). Processes that have a model each share texts out
(`replicas`). Imports `utils`.
"""
