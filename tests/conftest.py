"""Hypothesis profiles, and one thread.

HYPOTHESIS_PROFILE=all, of `make test-all`, draws twice as many examples, from more models, each of
which is traced by itself (see `tests.support.shared_traces`);
HYPOTHESIS_PROFILE=soak draws many more, and new ones each time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# The models are tiny: a second thread does nothing for them, and on a busy machine waiting for it
# takes a hundred times as long as the work.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Leave out Dynamo's trace log: thousands of empty records with every failure."""
    config.option.log_level = config.option.log_level or "WARNING"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out folders where scopes are handed out (``--dist loadscope``)."""
    if config.option.dist != "loadscope":
        return None
    from tests.support.by_folder import ByFolder

    return ByFolder(config, log)


def pytest_collection_finish() -> None:
    """Captures end with collections, full ones at times, which need not look at imports."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Trace models that are alike once in a process; see `tests.support.shared_traces`."""
    own = os.environ.get("HYPOTHESIS_PROFILE", "ci") != "ci" or any(
        item.get_closest_marker(name) for name in ("traced", "slow")
    )
    from tests.support.shared_traces import sharing  # imports much, which only workers need

    with nullcontext() if own else sharing():
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def _settled() -> Iterator[None]:
    """What a file's tests keep for others is not looked at again by every later collection."""
    yield
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown() -> None:
    """Let go of the shape environments that torch keeps in caches of methods.

    They hold what former tests traced, and full collections would look at all of it.
    """
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


# No deadline: the first example of a model pays for its capture, and machines are shared.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci",
    max_examples=20,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.register_profile("all", settings.get_profile("ci"), max_examples=40)
settings.register_profile(
    "soak", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
