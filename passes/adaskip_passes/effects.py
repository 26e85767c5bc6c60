"""What a node does besides computing its value: in-place writes, and views through which they act.

FX believes that no ``call_method`` is impure, so its own dead-code removal erases every K/V write
of a captured decoder (pytorch issue 68301). Everything here that moves or removes nodes asks this
module instead.
"""

from __future__ import annotations

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


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: ``add_``, ``linear``, ``softmax``."""
    if isinstance(node.target, str):
        return node.target.rsplit(".", 1)[-1]
    return getattr(node.target, "__name__", str(node.target))


def is_mutation(node: fx.Node) -> bool:
    """True for a node that writes into one of its arguments."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    if node.target in _INPLACE_FUNCTIONS or _schema_writes(node.target):
        return True
    name = operation(node)
    return name.endswith("_") and not name.endswith("__")


def _schema_writes(target: Any) -> bool:
    """Operators registered with torch say so in their schema, one for each overload."""
    names = target.overloads() if hasattr(target, "overloads") else ()
    overloads = [getattr(target, name) for name in names] or [target]
    return any(getattr(getattr(o, "_schema", None), "is_mutable", False) for o in overloads)


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose storage `node` may share, found through views and in-place results.

    Conservative: an operation that only sometimes returns a view (``reshape``, ``to``) counts as
    one.
    """
    while node.op in ("call_function", "call_method"):
        views = operation(node) in _VIEWS or is_mutation(node)
        if not views or not node.args or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def written(node: fx.Node) -> fx.Node | None:
    """The node whose storage a mutation writes to, or None for a node without effects."""
    if not is_mutation(node):
        return None
    target = node.args[0]
    return storage_root(target) if isinstance(target, fx.Node) else None


def accesses(nodes: Iterable[fx.Node], root: fx.Node) -> list[fx.Node]:
    """The nodes, in order, that read or write the storage of `root`, directly or through a view."""
    return [n for n in nodes if any(storage_root(i) is root for i in n.all_input_nodes)]
