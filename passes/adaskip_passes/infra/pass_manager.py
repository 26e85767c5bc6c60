"""Run passes: this place alone copies, lints, times, dumps and diffs, at every level.

``torch.fx.passes.infra.pass_manager.PassManager`` is not used. It changes the graph that it is
called with, generates code after every pass (of an outer graph, which nothing runs as Python, that
takes longer than all passes together), turns what a pass raises into a plain ``Exception``, so that
an `UnsupportedError` would be lost, and neither times nor shows anything. Its order constraints
would be of use for pipelines that are put together by others; here a pipeline is a tuple.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from .graph_module import check, copied, text
from .logs import is_traced, logger_of, trace_text
from .pass_base import Pass, PassResult

_LOG = logger_of(__name__)


@dataclass(frozen=True)
class Step:
    """What one pass did, for those who watch.

    Attributes:
        name: The name of the pass.
        changes: How many places it rewrote.
        seconds: How long it ran.
        before: The graph before it, as text.
        after: The graph after it, as text.
    """

    name: str
    changes: int
    seconds: float
    before: str
    after: str

    def diff(self) -> str:
        """Return the change as a unified diff of the graph's text."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), "before", self.name, lineterm=""
        )
        return "\n".join(lines)


def run_passes(
    graph_module: fx.GraphModule,
    passes: Sequence[Pass],
    watch: Callable[[Step], None] | None = None,
    *,
    copy: bool = True,
) -> fx.GraphModule:
    """Run passes in order, each on what the one before left.

    Args:
        graph_module: A captured graph, an outer graph or the graph of a piece.
        passes: What to run.
        watch: Receives a `Step` after each pass. Without it, and with neither logging nor tracing
            on, no text is made, which matters: linking a plan must take milliseconds.
        copy: Whether to change a copy and leave `graph_module` as it is. What the graph calls is
            shared.

    Returns:
        The changed copy, or `graph_module` itself where `copy` is false.

    Raises:
        UnsupportedError: From a pass.
        TypeError: A pass did not return a `PassResult`.
        RuntimeError: A pass left an ill-formed graph.
    """
    result = copied(graph_module) if copy else graph_module
    for rewrite in passes:
        result = _run(rewrite, result, watch)
    return result


def _run(
    rewrite: Pass, graph_module: fx.GraphModule, watch: Callable[[Step], None] | None
) -> fx.GraphModule:
    """Run one pass, check what it left, and report what it did if anybody wants to know."""
    reported = watch is not None or _LOG.isEnabledFor(logging.DEBUG) or is_traced()
    before = text(graph_module) if reported else ""
    start = time.perf_counter()
    result = rewrite(graph_module)
    seconds = time.perf_counter() - start
    if not isinstance(result, PassResult):
        raise TypeError(
            f"{type(rewrite).__name__} returned {type(result).__name__}; a pass returns "
            "PassResult(graph_module, changes)"
        )
    check(result.graph_module)
    if result.modified:
        result.graph_module.recompile()
    if reported:
        after = text(result.graph_module)
        step = Step(rewrite.name, result.changes, seconds, before, after)
        _report(step)
        if watch is not None:
            watch(step)
    return result.graph_module


def _report(step: Step) -> None:
    """Write a step to the log and to torch's structured trace."""
    if not step.changes:
        _LOG.debug("%s changed nothing (%.2f ms)", step.name, 1e3 * step.seconds)
        return
    if _LOG.isEnabledFor(logging.DEBUG):
        _LOG.debug("%s: %d changes (%.2f ms)", step.name, step.changes, 1e3 * step.seconds)
        _LOG.debug("graph before %s:\n%s", step.name, step.before)
        _LOG.debug("graph after %s:\n%s", step.name, step.after)
        _LOG.debug("diff of %s:\n%s", step.name, step.diff())
    trace_text(f"before_{step.name}", lambda: step.before)
    trace_text(f"after_{step.name}", lambda: step.after)
