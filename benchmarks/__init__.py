"""Measurements: `python -m benchmarks run WORKLOAD` writes JSON, with its conditions."""
