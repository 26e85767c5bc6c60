"""From a function to an FX graph that runs without Dynamo, and what in Python it depends on.

`dynamo` has the private interfaces of torch. Imports only `errors`.
"""
