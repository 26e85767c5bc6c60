"""A slice of a list of modules as a plain list, while a model is traced.

Decoders go through ``self.layers[: self.config.num_hidden_layers]``. torch makes another
``nn.ModuleList`` of that, all of which Dynamo would trace, for the same modules in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

_of_torch: Callable[..., Any] = nn.ModuleList.__getitem__


@contextmanager
def plain_slices() -> Iterator[None]:
    """Let slices of lists of modules be traced as plain lists; who runs code has torch's own."""
    if nn.ModuleList.__getitem__ is not _of_torch:  # another's, which is traced
        yield
        return
    with patch.object(nn.ModuleList, "__getitem__", _item):
        yield


def _item(modules: nn.ModuleList, index: int | slice) -> Any:
    plain = torch.compiler.is_dynamo_compiling() and type(modules) is nn.ModuleList
    if plain and isinstance(index, slice):
        return list(modules._modules.values())[index]
    return _of_torch(modules, index)
