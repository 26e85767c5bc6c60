"""What a node does besides computing its value: in-place writes, and views through which they act.

FX believes that no ``call_method`` is impure, so its own dead-code removal erases every K/V write
of a captured decoder (pytorch issue 68301). Everything here that moves or removes nodes asks this
module instead.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

_INPLACE_NAMES = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "setitem"),
)
_INPLACE_FUNCTIONS = frozenset(getattr(operator, name) for name in _INPLACE_NAMES)
_VIEWS = frozenset(
    " ".join(
        (
            "narrow view view_as reshape flatten unflatten ravel transpose swapaxes swapdims",
            "permute movedim moveaxis t mT T H mH real imag adjoint select unsqueeze squeeze",
            "expand expand_as broadcast_to chunk split tensor_split hsplit vsplit dsplit unbind",
            "unfold diagonal as_strided contiguous to type_as float half bfloat16 double data",
            "detach alias getitem getattr",
        )
    ).split()
)


#: Calls between which an autocast region lies.
AUTOCAST_ENDS = ("_enter_autocast", "_exit_autocast")


def operation(node: fx.Node) -> str:
    """Return the bare name of what a node calls: ``add_``, ``linear``, ``softmax``."""
    if isinstance(node.target, str):
        return node.target.rsplit(".", 1)[-1]
    return getattr(node.target, "__name__", str(node.target))


def is_mutation(node: fx.Node) -> bool:
    """Return whether a node writes into one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    schema = _schema(node.target)
    if node.target in _INPLACE_FUNCTIONS or (schema is not None and schema.is_mutable):
        return True
    name = operation(node)
    return name.endswith("_") and not name.endswith("__")


def _schema(target: Any) -> Any:
    """Return the schema of an operator registered with torch; None for anything else."""
    if hasattr(target, "overloads"):
        target = getattr(target, "default", None)
    return getattr(target, "_schema", None)


def _destination(node: fx.Node) -> Any:
    """Return the argument that a mutation writes to."""
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    schema = _schema(node.target)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return node.args[position] if position < len(node.args) else node.kwargs[argument.name]
    return node.args[0] if node.args else None


def storage_root(node: fx.Node) -> fx.Node:
    """Return the node whose storage `node` may share, found through views and in-place results.

    Conservative: an operation that only sometimes returns a view (``reshape``, ``to``) counts as
    one.
    """
    while node.op in ("call_function", "call_method"):
        base: Any = None
        if is_mutation(node):
            base = _destination(node)
        elif node.args and operation(node) in _VIEWS:
            base = node.args[0]
        if not isinstance(base, fx.Node):
            break
        node = base
    return node


def written(node: fx.Node) -> fx.Node | None:
    """Return the node whose storage a mutation writes to, or None for a node without effects."""
    if not is_mutation(node):
        return None
    target = _destination(node)
    return storage_root(target) if isinstance(target, fx.Node) else None


def accesses(nodes: Iterable[fx.Node], root: fx.Node) -> list[fx.Node]:
    """Return the nodes that read or write the storage of `root`, also through views, in order."""
    return [n for n in nodes if any(storage_root(i) is root for i in n.all_input_nodes)]


def dependencies(nodes: Iterable[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return for each node what must come before it.

    That is its inputs, and the last writes to what it reads.

    Args:
        nodes: Of one graph, in order.

    """
    root_of = functools.cache(storage_root)
    last: dict[fx.Node, fx.Node] = {}
    found = {}
    for node in nodes:
        inputs = node.all_input_nodes
        writes = (last.get(root_of(i)) for i in inputs) if last else ()
        found[node] = (*inputs, *(w for w in writes if w is not None))
        root = written(node)
        if root is not None:
            last[root] = node
    return found
