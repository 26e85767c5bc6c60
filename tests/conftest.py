"""Hypothesis profiles: HYPOTHESIS_PROFILE=soak draws many more examples, and new ones each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: the first example of a model pays for its capture, and machines are shared.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci",
    max_examples=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.register_profile(
    "soak", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
