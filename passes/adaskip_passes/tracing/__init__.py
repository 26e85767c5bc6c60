"""From a function to an FX graph that runs without Dynamo, and what in Python it depends on.

Imports `infra`, `errors` and `_torch`, which has the private interfaces of torch.
"""
