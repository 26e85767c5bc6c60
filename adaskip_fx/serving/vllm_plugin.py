"""What vLLM calls in each of its processes before it looks at a model: `register`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from adaskip_fx.serving.planned_model import planned_class


@dataclass(frozen=True)
class PlannedEntry:
    """An architecture in vLLM's registry, whose models follow a plan.

    Attributes:
        stock: The entry that was there. What vLLM asks about an architecture (whether it makes
            text, whether it can be spread over processes) is as the stock one answers.
    """

    stock: Any

    def inspect_model_cls(self) -> Any:
        """Return what vLLM knows of the architecture without importing it."""
        return self.stock.inspect_model_cls()

    def load_model_cls(self) -> type[nn.Module]:
        """Return the model's class; it is made when it is first wanted."""
        return planned_class(self.stock.load_model_cls())


def register() -> None:
    """Have every architecture that vLLM knows follow a plan, or refuse one.

    All of them: a stock architecture would ignore a plan, and nobody would notice. Models without
    a plan in their configuration stay as they are. May be called more than once.
    """
    from vllm import ModelRegistry

    for name, entry in ModelRegistry.models.items():
        if not isinstance(entry, PlannedEntry):
            ModelRegistry.models[name] = PlannedEntry(entry)
