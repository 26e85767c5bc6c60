"""When two pieces are the same code."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def structural_key(module: fx.GraphModule) -> str:
    """Return a digest that is equal for pieces that compile to the same code.

    It covers every operation, constant and the shape, stride, dtype and device of every input, but
    no name and no weight.
    """
    number = {node: i for i, node in enumerate(module.graph.nodes)}
    rows: list[tuple[str, ...]] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            rows.append(("input", _describe(node.meta.get("example_value"))))
        else:
            target = _constant(module, node) if node.op == "get_attr" else _target(node.target)
            rows.append((node.op, target, _encode((node.args, node.kwargs), number)))
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        sizes, strides = list(map(str, value.shape)), list(map(str, value.stride()))
        return f"{sizes} {strides} {value.dtype} {value.device} {value.requires_grad}"
    return f"{type(value).__name__} {value}"


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
    if isinstance(target, types.FunctionType):  # its code and what it closes over count as well
        cells = [cell.cell_contents for cell in target.__closure__ or ()]
        code = target.__code__
        name += f" {code.co_code.hex()} {code.co_consts!r} {target.__defaults__!r} {cells!r}"
    return name


def _encode(value: Any, number: Mapping[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{number[value]}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_encode(v, number) for v in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_encode(v, number)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_encode((value.start, value.stop, value.step), number)}"
    if isinstance(value, types.FunctionType):
        return _target(value)
    return f"{type(value).__name__}:{value!r}"


def _constant(module: fx.GraphModule, node: fx.Node) -> str:
    """Return the content of an attribute: of a subgraph its own key, of a tensor its bytes."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if isinstance(value, fx.GraphModule):
        return structural_key(value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return f"{_describe(value)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
    return f"{type(value).__name__}:{value!r}"
