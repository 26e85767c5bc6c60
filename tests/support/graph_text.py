"""What a captured graph says, as text that does not depend on how its nodes are called."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from adaskip_passes.tracing.capture import Capture


def lines(capture: Capture) -> list[str]:
    """One line a node: operation, operands, description of the value, path of its module.

    Inputs are named by their sources, and lengths by the sources that they are equal to; where
    a length is computed, and how often, is left out.
    """
    writer = _Writer(capture)
    inner = (n for n in capture.graph.graph.nodes if n.op != "placeholder" and not _is_length(n))
    return [writer.line(node) for node in inner]


def inputs(capture: Capture) -> set[str]:
    """The tensors that a captured graph takes, with their descriptions."""
    writer = _Writer(capture)
    return {
        f"{source}: {writer.value(node.meta['example_value'])}"
        for node, source in writer.source.items()
        if not _is_length(node)
    }


def _is_length(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.SymInt)


class _Writer:
    def __init__(self, capture: Capture) -> None:
        placeholders = capture.graph.graph.find_nodes(op="placeholder")
        self.source = dict(zip(placeholders, capture.sources, strict=True))
        self.number: dict[fx.Node, int] = {}
        self.env = capture.shape_env
        equal: dict[Any, list[str]] = {}
        for symbol, sources in self.env.var_to_sources.items() if self.env is not None else ():
            assert self.env is not None
            names = [s.name() if callable(s.name) else s.name for s in sources]
            equal.setdefault(self.env.replace(symbol), []).extend(names)
        self.known = {s: sympy.Symbol(f"<{min(n)}>") for s, n in equal.items() if s.free_symbols}

    def line(self, node: fx.Node) -> str:
        self.number[node] = len(self.number)
        target = getattr(node.target, "__name__", str(node.target))
        stack = node.meta.get("nn_module_stack") or {}
        path = [path for path, _ in stack.values()][-1:]
        operands = f"{self.operand(node.args)} {self.operand(node.kwargs)}"
        return (
            f"{node.op} {target} {operands} -> {self.value(node.meta.get('example_value'))} {path}"
        )

    def operand(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if _is_length(value):
                return self.value(value.meta["example_value"])
            return self.source.get(value) or f"%{self.number[value]}"
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self.operand, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k}: {self.operand(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            return f"slice{self.operand((value.start, value.stop, value.step))}"
        return repr(value)

    def value(self, value: Any) -> str:
        if isinstance(value, torch.SymInt):
            assert self.env is not None
            known = sympy.sympify(self.env.replace(value.node.expr)).xreplace(self.known)
            return str(sympy.expand(known))
        if isinstance(value, torch.Tensor):
            sizes, strides = (list(map(self.value, s)) for s in (value.shape, value.stride()))
            parameter = isinstance(value, torch.nn.Parameter)
            return (
                f"{sizes} {strides} {value.dtype} {value.device} {value.requires_grad} {parameter}"
            )
        if isinstance(value, tuple | list):
            return f"({', '.join(map(self.value, value))})"
        return str(value)
