"""The proof on a few tokens: no captured graph is used that gives other logits than the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaskip_fx import api
from adaskip_fx.api import build
from adaskip_fx.capture import reference
from adaskip_fx.capture.reference import run_reference
from adaskip_fx.model.handle import runtime_of
from adaskip_passes import UnsupportedError
from tests.support.families.all import tiny_config, tiny_model


def model_of(family: str = "llama") -> Any:
    return tiny_model(tiny_config(family))


def of_other_logits(right: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A reference run whose steps say that the model gave something else."""
    steps = {
        phase: tuple(replace(step, logits=change(step.logits)) for step in group)
        for phase, group in right.steps.items()
    }
    return replace(right, steps=steps)


def be_wrong(patch: pytest.MonkeyPatch, change: float) -> None:
    """Have every reference run say logits that differ by so much of the largest."""

    def changed(*arguments: Any) -> Any:
        right = run_reference(*arguments)
        return of_other_logits(right, lambda logits: logits + change * logits.abs().max())

    for module in (api, reference):
        patch.setattr(module, "run_reference", changed)


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    be_wrong(monkeypatch, 2e-3)
    with pytest.raises(UnsupportedError) as caught:
        build(model_of(), None, backend="eager")
    message = str(caught.value)
    assert message.startswith(
        "the graph captured for prefill gives other logits than the model: on 5 token(s) after 0 "
        "they differ by 2.0e-03 of the largest. The model's code depends on something that was "
    )


def test_what_other_kernels_may_differ_by_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    be_wrong(monkeypatch, 5e-4)
    build(model_of(), None, backend="eager")


def test_states_are_stored_as_without_autocast() -> None:
    """A state that is met in a region first is not kept in half precision for all requests."""
    model = model_of("mamba")
    with torch.autocast("cpu", torch.bfloat16):
        specs = run_reference(model).specs
    assert specs == run_reference(model).specs
    assert {state.dtype for spec in specs for state in spec.states} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # the companion
        cache = model(torch.tensor([[3, 4, 5]])).cache_params
    assert cache.layers[0].conv_states[0].dtype == torch.bfloat16


def test_bfloat16_is_compared_as_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    build(model_of().bfloat16(), None, backend="eager")
    be_wrong(monkeypatch, 0.3)
    with pytest.raises(UnsupportedError, match=r"they differ by 2\.\de-01 of the largest"):
        build(model_of().bfloat16(), None, backend="eager")


@torch.no_grad()
def test_weights_may_change_before_the_next_capture() -> None:
    """Decode is captured when it is needed, and then compared with the model as it is then."""
    model = model_of()
    compiled = build(model, None, backend="eager")
    for parameter in model.parameters():
        parameter.mul_(1.2)
    ids = torch.arange(9).unsqueeze(0)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **options), model.generate(ids, **options))
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_has_moved_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on another device proves nothing (there is but one here: it is made up)."""
    compiled = build(model_of(), None, backend="eager")
    state = runtime_of(compiled).graphs.states.current
    state.reference = of_other_logits(state.reference, lambda logits: logits.to("meta"))
    be_wrong(monkeypatch, 2e-3)
    with pytest.raises(UnsupportedError, match="captured for decode gives other logits"):
        compiled.generate(torch.arange(9).unsqueeze(0), max_new_tokens=3, do_sample=False)
    assert state.reference.device.type == "cpu"


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "falcon_h1", "mamba", "qwen3_next"])
def test_what_layers_store(family: str) -> None:
    """Shapes as of what transformers' own cache holds after the same tokens."""
    model = model_of(family)
    specs = run_reference(model).specs
    argument = "cache_params" if family == "mamba" else "past_key_values"
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5).unsqueeze(0), use_cache=True)[argument]
    assert len(specs) == len(cache.layers)
    for spec, layer in zip(specs, cache.layers, strict=True):
        keys = getattr(layer, "keys", None)
        assert spec.attends == (keys is not None)
        if keys is not None:
            assert (spec.key_heads, spec.key_dim) == (keys.shape[1], keys.shape[3])
            assert (spec.value_heads, spec.value_dim) == (
                layer.values.shape[1],
                layer.values.shape[3],
            )
        states = [*getattr(layer, "conv_states", {}).values()]
        states += getattr(layer, "recurrent_states", {}).values()
        expected = [(tuple(t.shape[1:]), t.dtype) for t in states if t is not None]
        assert [(s.shape, s.dtype) for s in spec.states] == expected


def test_a_cache_that_is_not_understood() -> None:
    """Layers that keep an index besides keys and values (DeepSeek-V3.2)."""
    with pytest.raises(UnsupportedError, match="layer 0 keeps its memory in a Dynamic"):
        run_reference(model_of("deepseek_v32"))
