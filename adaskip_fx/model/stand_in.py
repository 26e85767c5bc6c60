"""A model with one module exchanged, for one call: neither the model nor its modules are changed.

The modules on the way to the one that is exchanged are copied without what is below them, so that
other threads, and the other requests of a model, see nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """What is called in the place of a module, and has the module's attributes."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        """Call `function` where `module` would be called."""
        super().__init__()
        vars(self)["_function"], vars(self)["_stands_for"] = function, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_stands_for"], name)


def with_stand_in(model: Any, kind: type, path: Sequence[str], function: Callable[..., Any]) -> Any:
    """Return a model of class `kind` with the modules of `model`, but for one.

    Args:
        model: any model.
        kind: the class of what is returned; that of the model before it was compiled.
        path: the attributes that lead to the module.
        function: it is called in the module's place.
    """
    name, *below = path
    module = model._modules[name]
    assert module is not None
    twin: Any = object.__new__(kind)
    vars(twin).update(vars(model))
    inner = with_stand_in(module, type(module), below, function) if below else None
    vars(twin)["_modules"] = {**model._modules, name: inner or StandIn(function, module)}
    return twin
