"""What is named where a capture fails: layers and adapters that torch.compile does not trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adaskip_fx import UnsupportedError
from adaskip_fx.api import build
from tests.support.adapters import llama


def class_of(module: str, name: str, traced: bool) -> type[nn.Linear]:
    """A linear layer of a library with quantized weights, by its name; its code may be untraced."""

    class Quantized(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not traced:
                torch._dynamo.graph_break()
            return super().forward(x)

    Quantized.__module__, Quantized.__name__, Quantized.__qualname__ = module, name, name
    return Quantized


def with_layers(kind: type[nn.Linear]) -> Any:
    model = llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("module", "name", "library"),
    [
        ("bitsandbytes.nn.modules", "Linear4bit", "bitsandbytes"),
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "gptqmodel"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", "awq"),
        ("transformers.integrations.bitnet", "BitLinear", "transformers.integrations"),
    ],
)
def test_quantized_layers_are_named(module: str, name: str, library: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        build(with_layers(class_of(module, name, traced=False)), None, backend="eager")
    message = str(caught.value)
    assert message.startswith("torch.compile cannot capture _logits as one graph")
    assert message.endswith(
        f"model.layers.0.mlp.up_proj is a {name} of {library}, quantized weights that may be in "
        "the way: load the model without, or with torchao's int8 weights (Int8WeightOnlyConfig), "
        "which can be captured; or call the original model."
    )


def test_layers_that_can_be_traced_are_taken() -> None:
    """The companion: a library's name alone is no reason."""
    kind = class_of("bitsandbytes.nn.modules", "Linear4bit", traced=True)
    assert len(build(with_layers(kind), None, backend="eager").adaskip.sublayers) == 4


def test_nothing_is_named_where_nothing_is_unusual() -> None:
    with pytest.raises(UnsupportedError) as caught:
        build(with_layers(class_of("mine", "Mine", traced=False)), None, backend="eager")
    assert "in the way" not in str(caught.value)
