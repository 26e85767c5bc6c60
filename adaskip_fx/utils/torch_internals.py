"""The parts of torch that it does not promise, as adaskip_fx uses them.

No other module of adaskip_fx names one; `docs/explanation/private-interfaces.md` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.variables import UserDefinedObjectVariable
from torch.fx.experimental.symbolic_shapes import statically_known_true as statically_known_true

Subclass = TypeVar("Subclass", bound=torch.Tensor)


def mark_dynamic(tensor: torch.Tensor, dim: int, bounds: tuple[int, int] | None = None) -> None:
    """Have Dynamo take the length of a dimension for a symbol, between two numbers if given."""
    least, most = bounds or (None, None)
    torch._dynamo.mark_dynamic(tensor, dim, min=least, max=most)


@contextmanager
def reading_stored(stored: Callable[[object, str], str | None]) -> Iterator[None]:
    """Let Dynamo read what objects store without tracing their ``__getattribute__``.

    The first read of each object is traced, so that what the code looks at is guarded.

    Args:
        stored: from an object and a name to the name under which the object's own dictionary has
            what a read gives; None where the read is to be traced.
    """
    traced = UserDefinedObjectVariable.var_getattr

    def var_getattr(variable: Any, tx: Any, name: str) -> Any:
        own_code = variable._object_has_getattribute
        met = vars(variable).get("_adaskip_met", False)
        if not own_code and not met:
            return traced(variable, tx, name)
        plain = stored(variable.value, name) if met else None
        variable._adaskip_met = True
        variable._object_has_getattribute = plain is None
        try:
            return traced(variable, tx, name if plain is None else plain)
        finally:
            variable._object_has_getattribute = own_code

    with patch.object(UserDefinedObjectVariable, "var_getattr", var_getattr):
        yield


def is_transformed(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one that a transform of torch.func (vmap, grad) passes on."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def as_subclass(kind: type[Subclass], tensor: torch.Tensor) -> Subclass:
    """Return a tensor of the class `kind` with the content of `tensor`."""
    return torch.Tensor._make_subclass(kind, tensor)


def find_cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor would use, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError, RuntimeError):  # RuntimeError: Windows, without cl
        return None


def nothing_stands_before(module: Any) -> bool:
    """Return whether to call a module is to call its class's forward: no hook, nothing compiled."""
    every = nn.modules.module
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not (
        hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
        or type(module).__call__ is not nn.Module.__call__
    )
