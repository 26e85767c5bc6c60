"""The suite's own saving: what is alike is traced once, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.model.subclass import make_compiled_model
from tests.support.compiled_llamas import make_model
from tests.support.graph_text import inputs, lines
from tests.support.shared_traces import Description, SharedTraces, sharing

pytestmark = pytest.mark.traced
_IDS = torch.arange(3, 12)[None]


@pytest.fixture
def traces() -> Iterator[SharedTraces]:
    with sharing(SharedTraces()) as made:
        yield made


def compiled(model: Any) -> Any:
    return build(model, None, backend="eager")


def graph(fast: Any) -> Any:
    return runtime_of(fast).graphs._kept.first.capture


def test_models_that_are_alike_have_one_trace_and_weights_of_their_own(
    traces: SharedTraces,
) -> None:
    models = [make_model("one_layer", seed=seed) for seed in range(2)]
    first, second = map(compiled, models)
    assert (traces.traced, traces.shared) == (1, 1)
    with torch.no_grad():
        for model, fast in zip(models, (first, second), strict=True):
            got, expected = (m(_IDS, logits_to_keep=1).logits for m in (fast, model))
            torch.testing.assert_close(got, expected)
    assert (traces.traced, traces.shared) == (1, 1)
    with sharing(SharedTraces()):
        own = graph(compiled(models[1]))
    assert lines(graph(second)) == lines(own)
    assert inputs(graph(second)) == inputs(own)
    assert graph(first).graph is not graph(second).graph


def test_a_function_that_is_another_now_is_traced(
    traces: SharedTraces, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = modeling_llama.rotate_half
    compiled(make_model("one_layer"))
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -before(x))
    model = make_model("one_layer")
    fast = compiled(model)
    assert (traces.traced, traces.shared) == (2, 0)
    with torch.no_grad():
        got, expected = (m(_IDS, logits_to_keep=1).logits for m in (fast, model))
    torch.testing.assert_close(got, expected)


# What is alike ---------------------------------------------------------------------------------


def described(model: Any) -> list[Any]:
    description = Description()
    description.add(make_compiled_model(model))
    return description.parts


def _config(model: Any) -> None:
    model.config.hidden_act = "gelu"


def _attribute(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _width(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(33, 16)


def _strides(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()


def _method(model: Any) -> None:
    model.model.layers[0].mlp.forward = torch.zeros_like


@pytest.mark.parametrize("change", [_config, _attribute, _hook, _tie, _width, _strides, _method])
def test_what_differs_is_not_alike(change: Callable[[Any], None]) -> None:
    one, other = make_model("one_layer"), make_model("one_layer", seed=1)
    expected = described(one)
    assert described(other) == expected
    change(other)
    assert described(other) != expected


def test_a_class_whose_method_was_replaced_is_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("one_layer")
    before = described(model)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", torch.zeros_like)
    assert described(model) != before
