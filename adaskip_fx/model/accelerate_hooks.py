"""Forwards on instances, as accelerate's ``dispatch_model`` puts them there for its hooks.

A hook that moves nothing, since all is on one device, is left out of the compiled model. One that
moves weights or inputs would be called by one of the two models only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..utils.transformers_internals import ACCELERATE_HOOK, FORWARD_BEFORE


def is_replaced(module: nn.Module) -> bool:
    """Return whether a module's instance has a forward that does something else than its class's.

    Removing accelerate's hooks leaves the class's own there.
    """
    attributes = vars(module)
    if "forward" not in attributes:
        return False
    forward = attributes["forward"]
    if ACCELERATE_HOOK in attributes and _moves_nothing(attributes[ACCELERATE_HOOK], module):
        forward = attributes.get(FORWARD_BEFORE, forward)
    own = getattr(type(module), "forward", None)
    is_own = getattr(forward, "__func__", None) is own
    return not (is_own and getattr(forward, "__self__", None) is module)


def leave_out(model: nn.Module) -> None:
    """Take such forwards and hooks off the modules of a copy."""
    for module in model.modules():
        if "forward" in vars(module) and not is_replaced(module):
            for name in ("forward", ACCELERATE_HOOK, FORWARD_BEFORE):
                vars(module).pop(name, None)


def _moves_nothing(hook: Any, module: nn.Module) -> bool:
    """Return whether a hook of accelerate's finds everything where it would put it."""
    if type(hook).__name__ != "AlignDevicesHook" or getattr(hook, "offload", True):
        return False
    if hook.execution_device is None:
        return True
    target = torch.empty(0, device=hook.execution_device).device
    return all(t.device == target for t in (*module.parameters(), *module.buffers()))
