"""Call what Inductor compiled without the wrappers that AOTAutograd puts around it.

They are there for what a piece's inputs and outputs may need: gradients, views of one another,
subclasses of tensors. A piece whose wrappers hand its inputs on and its outputs back, each the same
object, needs none of that, and between short kernels they are a good part of a step's time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..tracing.dynamo import one_at_a_time

Compiled = Callable[..., Any]


def without_wrappers(function: Compiled) -> Compiled:
    """Return a function that does what a compiled graph does, and calls the innermost one itself.

    It does so from the second call on, if at the first the wrappers have changed nothing, and while
    no gradients are recorded. Of what no Inductor compiled, it is the function itself.

    Args:
        function: What `compile_fx` or another backend returned; it returns a sequence.

    """
    graph = _innermost(function)
    if graph is None:
        return function
    call: Callable[[list[Any]], Sequence[Any]] | None = None
    tried = False

    def run(*inputs: Any) -> Sequence[Any]:
        nonlocal call, tried
        if call is not None and not torch.is_grad_enabled():
            return call(list(inputs))
        if tried or torch.is_grad_enabled():
            return function(*inputs)  # type: ignore[no-any-return]
        with one_at_a_time:  # another thread may be here as well
            if tried:
                return run(*inputs)
            outputs, found = _watched(function, graph, inputs)
            call, tried = found, True
            return outputs

    return run


def _innermost(function: Any) -> Any:
    """Return the graph that Inductor compiled, which everything else is around; None without."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function if hasattr(function, "current_callable") else None


def _watched(
    function: Compiled, graph: Any, inputs: tuple[Any, ...]
) -> tuple[Sequence[Any], Callable[[list[Any]], Sequence[Any]] | None]:
    """Call a function; returns its outputs, and what may be called in its place, if anything."""
    call, seen = graph.current_callable, list[tuple[Any, ...]]()

    def watch(given: list[Any]) -> Any:
        taken = tuple(given)
        outputs = call(given)
        seen.append((taken, outputs))
        return outputs

    graph.current_callable = watch
    try:
        outputs = function(*inputs)
    finally:
        graph.current_callable = call
    alike = len(seen) == 1 and _same(seen[0][0], inputs) and _same(seen[0][1], outputs)
    return outputs, call if alike else None


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether two sequences hold the same objects."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
