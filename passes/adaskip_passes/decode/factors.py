"""Numbers that a projection's input or result is multiplied by (Granite, Falcon-H1, Cohere).

They are moved to where nothing is between them and the projection::

    linear(x * 2, w)                    linear(x, w) * 2
    linear(x, w).view(shape) * 3        (linear(x, w) * 3).view(shape)

which is the same but for rounding. So projections of one input are seen as that, whatever each of
them is multiplied by, and a factor can be part of a projection's kernel.
"""

from __future__ import annotations

import math
import operator

from torch import fx

from .matching import by_number, calls, dtype_of, only_user

_VIEWS = ("view", "reshape", "transpose", "permute", "unsqueeze", "contiguous")


def times(node: fx.Node) -> tuple[fx.Node, float] | None:
    """Return what a node multiplies by a number, or divides by one if that is exact, and which."""
    tensor, number = by_number(node, "mul")
    if tensor is None:
        tensor, divisor = by_number(node, "truediv")
        exact = math.isfinite(divisor) and abs(math.frexp(divisor)[0]) == 0.5  # a power of two
        if tensor is None or tensor is not node.args[0] or not exact:
            return None
        number = 1.0 / divisor
    return (tensor, number) if dtype_of(tensor) == dtype_of(node) else None


def move_factors(linear: fx.Node, overwritten: set[fx.Node]) -> None:
    """Move the factors of what a projection without a bias reads, and of views of its result."""
    read = linear.args[0]
    assert isinstance(read, fx.Node)
    while (found := times(read)) is not None and overwritten.isdisjoint((read, linear)):
        tensor, number = found
        linear.replace_input_with(read, tensor)
        _multiply(linear, number)
        read = tensor
    last = _after_factors(linear)
    views = [last]
    while (user := only_user(views[-1])) is not None and calls(user, *_VIEWS):
        views.append(user)
    found = times(user) if user is not None and len(views) > 1 else None
    if user is None or found is None or not overwritten.isdisjoint((*views, user)):
        return
    _multiply(last, found[1])
    user.replace_all_uses_with(views[-1])


def factor_of(linear: fx.Node, overwritten: set[fx.Node]) -> tuple[fx.Node, float]:
    """Return the multiple of a projection's result that alone is read, and which it is."""
    result, factor = linear, 1.0
    while (user := only_user(result)) is not None:
        found = times(user)
        if found is None or not overwritten.isdisjoint((result, user)):
            break
        result, factor = user, factor * found[1]
    return result, factor


def _after_factors(linear: fx.Node) -> fx.Node:
    return factor_of(linear, set())[0]


def _multiply(node: fx.Node, number: float) -> None:
    """Have everything that reads a node read its product with a number."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        product = node.graph.call_function(operator.mul, (node, number))
    product.meta["example_value"] = node.meta["example_value"]
    for user in users:
        user.replace_input_with(node, product)
