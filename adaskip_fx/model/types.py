"""The type of a compiled model: its own class is generated, so that mypy cannot know it."""

from __future__ import annotations

from typing import Protocol

from ..runtime.runtime import Runtime
from ..utils.transformers_types import CausalLM


class CompiledCausalLM(CausalLM, Protocol):
    """A decoder of transformers' that was compiled, with the runtime that it runs on."""

    _adaskip: Runtime
