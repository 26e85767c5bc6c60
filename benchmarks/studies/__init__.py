"""Studies of the method on a real model: ``python -m benchmarks run study_NAME``.

Each is one file with ``measure(options)``, which gives a result that JSON can hold, ``summary``,
which says it in a few lines, and ``PICTURES``, the kinds of `benchmarks.plots` drawn from it.
"""

from __future__ import annotations

from types import MappingProxyType

#: name on the command line -> module
STUDIES = MappingProxyType(
    {
        f"study_{name}": f"studies.{name}"
        for name in (
            *("similarity", "transfer", "window", "domain"),
            *("errors", "summaries", "families", "pareto", "recipe", "windows"),
            *("kv_cache", "shallow_prefill", "window_stand_ins"),
        )
    }
)
