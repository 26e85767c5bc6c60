"""Link an outer graph: from calls of pieces to something that runs.

Two ways, with equal results. `link` calls pieces that were compiled before, which takes
milliseconds; `fuse` writes the pieces back into one flat graph for a compiler that wants the whole.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from ..infra.graph_module import text
from ..infra.logs import logger_of, trace_text
from ..partition.outer import Piece, piece_of

_LOG = logger_of(__name__)

Compiled = Callable[..., Any]


class _Instruction(NamedTuple):
    """A call: its function, how arguments are read from registers, and where the result goes."""

    function: Compiled
    arguments: Callable[[list[Any]], tuple[Any, ...]]
    result: int
    dead: tuple[int, ...]


class Linked:
    """A program: instructions over registers, the first of which are its inputs.

    A value is dropped after its last use, as in code that FX generates: the streams of a long
    prompt would otherwise all be alive at the end. Building this takes a millisecond where
    generating and compiling Python text takes twenty.

    Attributes:
        functions: what it calls, each once.
    """

    def __init__(self, outer: fx.GraphModule, compiled: Callable[[Piece], Compiled]) -> None:
        nodes = list(outer.graph.nodes)
        register = {node: i for i, node in enumerate(nodes)}
        self._size = len(nodes)
        self._program = []
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            piece = piece_of(node)
            function = compiled(piece) if piece is not None else node.target
            assert callable(function)
            used_up = [
                i
                for i in node.all_input_nodes
                if i.op != "placeholder" and max(i.users, key=register.__getitem__) is node
            ]
            self._program.append(
                _Instruction(
                    function,
                    _reader(node.args, register),
                    register[node],
                    tuple(register[i] for i in used_up),
                )
            )
        self.functions = frozenset(step.function for step in self._program)
        (results,) = outer.graph.output_node().args
        assert isinstance(results, tuple | list)
        self._results = _reader(tuple(results), register)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the program.

        Args:
            *inputs: The values of the outer graph's placeholders, in order.

        Returns:
            What the outer graph returns.
        """
        registers = [*inputs, *[None] * (self._size - len(inputs))]
        for function, arguments, result, used_up in self._program:
            registers[result] = function(*arguments(registers))
            for dead in used_up:
                registers[dead] = None
        return self._results(registers)


def _reader(
    arguments: tuple[Any, ...], register: Mapping[fx.Node, int]
) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Return a function from registers to the values of a call's arguments.

    Args:
        arguments: Nodes, constants and tuples of nodes.
        register: Where the value of each node is.

    """
    places = [register[a] if isinstance(a, fx.Node) else None for a in arguments]
    if None not in places:
        if len(places) == 1:
            return lambda registers: (registers[places[0]],)  # type: ignore[index]
        return operator.itemgetter(*places) if places else lambda registers: ()

    def read(registers: list[Any]) -> tuple[Any, ...]:
        return fx.map_arg(arguments, lambda n: registers[register[n]])

    return read


def link(outer: fx.GraphModule, compiled: Callable[[Piece], Compiled]) -> Linked:
    """Return a function of the outer graph's placeholders, in order, that calls compiled pieces.

    Args:
        outer: an outer graph, as the passes left it.
        compiled: gives the callable of a piece.

    Returns:
        A function that returns what the outer graph returns (a tuple).
    """
    start = time.perf_counter()
    linked = Linked(outer, compiled)
    seconds = time.perf_counter() - start
    _LOG.info("linked %d functions in %.2f ms", len(linked.functions), 1e3 * seconds)
    trace_text("linked", lambda: text(outer))
    return linked


def fuse(outer: fx.GraphModule) -> fx.GraphModule:
    """Return the flat graph that an outer graph stands for.

    Before::                                  After::

        x_1 = self.layers_0_ffn(x, w, ...)        h = linear(x, w)
                                                  x_1 = x + h

    For an outer graph that no pass has changed this is the captured graph, with the same text, but
    that values which one sublayer alone needs are computed there, and that a stream which was
    overwritten in place gets results of its own. Legal because a call and its body are the same
    computation.
    """
    flat = fx.Graph()
    root = fx.GraphModule(outer, flat)
    value: dict[fx.Node, Any] = {}
    for node in outer.graph.nodes:
        piece = piece_of(node) if node.op == "call_module" else None
        if piece is not None:
            value[node] = _inline(flat, root, piece, fx.map_arg(node.args, lambda n: value[n]))
        elif node.op == "call_function" and isinstance(value.get(node.all_input_nodes[0]), tuple):
            value[node] = value[node.all_input_nodes[0]][node.args[1]]
        else:
            value[node] = flat.node_copy(node, lambda n: value[n])
    fused = fx.GraphModule(root, flat, "Fused")
    _LOG.info("fused into %d nodes", len(flat.nodes))
    trace_text("fused", lambda: text(fused))
    return fused


def _inline(flat: fx.Graph, root: fx.GraphModule, piece: Piece, arguments: Sequence[Any]) -> Any:
    """Copy a piece's nodes into `flat`; returns the node or nodes that the piece returns."""
    inner = piece.module.graph
    copies = dict(zip(inner.find_nodes(op="placeholder"), arguments, strict=True))
    for node in inner.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            _adopt(root, piece.module, str(node.target))
        copies[node] = flat.node_copy(node, lambda n: copies[n])
    (result,) = inner.output_node().args
    return fx.map_arg(result, lambda n: copies[n])


def _adopt(root: fx.GraphModule, owner: fx.GraphModule, target: str) -> None:
    """Make an attribute of a piece an attribute of the flat module."""
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    if "." not in target and not hasattr(root, target):
        setattr(root, target, value)
