"""Return a value that modules of some classes compute inside of sublayers: a router's logits.

Before::                                    After::

    x_2 = self.layers_0_ffn(x_1, ...)           x_2 = self.layers_0_ffn(x_1, ...)
    ...                                         inner = self.layers_0_ffn_inner(x_1, ...)
    return (logits,)                            return (logits, inner, ...)

Each comes of a piece of its own, which is a copy of the sublayer up to the value. Legal because
nothing else changes. Run it first: the sublayers are those of the full model then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedError
from ..infra.pass_base import Pass, PassResult
from ..partition.outer import piece_of, sublayer_calls
from .hidden_states import piece_until


@dataclass(frozen=True)
class InnerValues(Pass):
    """Pass over an outer graph: return one value of every sublayer with a module of some class.

    They are the last outputs, in stream order. Its changes are values.

    Attributes:
        classes: names of the modules' classes.
        width: of the value's last axis.
        choice: which of the values of this width that such a module computes, in order.
    """

    classes: frozenset[str]
    width: int
    choice: int

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Append the outputs; see :class:`Pass`.

        Raises:
            UnsupportedError: No sublayer has such a value.
        """
        outer, made = graph_module, list[fx.Node]()
        for _, call in sorted(sublayer_calls(outer.graph).items()):
            piece = piece_of(call)
            assert piece is not None
            values = [n for n in piece.module.graph.nodes if self._is_wanted(n)]
            if values:
                if len(values) <= self.choice:
                    raise UnsupportedError(f"{piece.name} computes {len(values)} such values alone")
                name = f"{piece.name}_inner"
                made.append(piece_until(outer, call, values[self.choice], name))
        if not made:
            raise UnsupportedError(f"no sublayer has a {', '.join(sorted(self.classes))}")
        output = outer.graph.output_node()
        (results,) = output.args
        assert isinstance(results, tuple | list)
        output.args = ((*results, *made),)
        return PassResult(outer, len(made))

    def _is_wanted(self, node: fx.Node) -> bool:
        example, stack = node.meta.get("example_value"), node.meta.get("nn_module_stack")
        if not stack or not isinstance(example, torch.Tensor) or node.op == "placeholder":
            return False
        _, kind = [*stack.values()][-1]
        name = getattr(kind, "__name__", str(kind).rpartition(".")[2])
        shaped = example.dim() > 1 and example.is_floating_point()
        return name in self.classes and shaped and _is(example.shape[-1], self.width)


def _is(length: Any, width: int) -> bool:
    return isinstance(length, int) and length == width  # (a symbol is not compared: it would guard)
