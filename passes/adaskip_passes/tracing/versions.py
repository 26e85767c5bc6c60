"""What differs between the versions of torch that are supported, and which version it is.

(Of transformers nothing does that would need code.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.variables.torch import tracing_state_functions


def source_name(source: Any) -> str:
    """A Dynamo source as Python text. Its ``name`` is a property since 2.12, a method before."""
    name = source.name
    return str(name() if callable(name) else name)


@contextmanager
def not_exporting() -> Iterator[None]:
    """Meanwhile `torch.compiler.is_exporting` is false where Dynamo traces it.

    Dynamo of 2.11 takes it for true in every trace (2.13 does not): Mamba has other code then. (Its
    table is changed and not the function, which Dynamo's caches know by identity.)
    """
    with patch.dict(tracing_state_functions(), {torch.compiler.is_exporting: False}):
        yield
