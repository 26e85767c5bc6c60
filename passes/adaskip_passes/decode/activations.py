"""Activations as transformers writes them, by what they are applied to."""

from __future__ import annotations

import math

from torch import fx

from .matching import argument, by_number, calls, only_user, operands


def activated(x: fx.Node) -> tuple[fx.Node, str] | None:
    """Return what alone reads `x` and is an activation of it, and its name in `project`."""
    user = only_user(x)
    if user is None:
        return _tanh_written_out(x)
    if user.args != (x,) or user.kwargs.get("inplace"):
        return None
    if calls(user, "gelu"):
        names = {"tanh": "gelu_tanh", "none": "gelu"}
        name = names.get(str(user.kwargs.get("approximate", "none")))
        return (user, name) if name is not None else None
    if calls(user, "silu"):
        return user, "silu"
    if not calls(user, "relu"):
        return None
    square = only_user(user)
    if square is not None and (_is_power(square, user, 2) or _is_square(square, user)):
        return square, "relu_squared"
    return user, "relu"


def _tanh_written_out(x: fx.Node) -> tuple[fx.Node, str] | None:
    """Return ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``, if it reads `x`."""
    halves = [user for user in x.users if by_number(user, "mul") == (x, 0.5)]
    result = only_user(halves[0]) if len(halves) == 1 else None
    if result is None or len(x.users) != 3:
        return None
    for half, one_more in operands(result, "mul"):
        tanh, one = by_number(one_more, "add")
        if half is halves[0] and tanh is not None and one == 1.0 and only_user(tanh) is one_more:
            inner = argument(tanh, "tanh")
            if inner is not None and len(one_more.users) == 1 and _is_inside(inner, tanh, x):
                return result, "gelu_tanh"
    return None


def _is_inside(node: fx.Node, tanh: fx.Node, x: fx.Node) -> bool:
    """Return whether `node` is ``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``, which `tanh` reads."""
    total, root = by_number(node, "mul")
    if total is None or root != math.sqrt(2.0 / math.pi):
        return False
    for plain, rest in operands(total, "add"):
        cube, factor = by_number(rest, "mul")
        if plain is x and factor == 0.044715 and cube is not None and _is_power(cube, x, 3):
            users = ((node, tanh), (total, node), (rest, total), (cube, rest))
            return all(only_user(one) is user for one, user in users)
    return False


def _is_power(node: fx.Node, x: fx.Node, exponent: int) -> bool:
    return calls(node, "pow") and node.args == (x, exponent) and not node.kwargs


def _is_square(node: fx.Node, x: fx.Node) -> bool:
    return calls(node, "square") and node.args == (x,) and not node.kwargs
