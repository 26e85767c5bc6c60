"""What of a model must stay as it was."""

from __future__ import annotations

import copy
from typing import Any

import torch


def snapshot(model: Any) -> dict[str, Any]:
    """All that could be changed about a model."""
    modules = {
        name: {
            "class": type(module),
            "attributes": sorted(vars(module)),
            "training": module.training,
            "hooks": {k: list(v) for k, v in vars(module).items() if k.endswith("_hooks") and v},
            "config": id(getattr(module, "config", None)),
        }
        for name, module in model.named_modules()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    generation = getattr(model, "generation_config", None)
    return {
        "modules": modules,
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation": generation.to_dict() if generation is not None else None,
        "tensors": {name: (id(t), t.data_ptr(), t.requires_grad) for name, t in tensors},
        "values": {name: t.detach().clone() for name, t in tensors},
        "class": (type(model), type(model).forward),
    }


def assert_unchanged(model: Any, before: dict[str, Any]) -> None:
    after = snapshot(model)
    values = after.pop("values")
    assert after == {k: v for k, v in before.items() if k != "values"}
    for name, value in before["values"].items():
        assert torch.equal(value, values[name]), name
