"""The compiled model shares the original's tensors, and the original stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import make_model
from tests.support.eager_reference import Oracle, assert_close
from tests.support.sharing import assert_unchanged, snapshot

IDS = torch.arange(3, 15).unsqueeze(0)


def run(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS, logits_to_keep=1, **more).logits
        return logits


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model and the same compiled; tests leave the weights as they were."""
    model = make_model("one_layer")
    return model, build(model, None, backend="eager")


def test_the_original_is_unchanged_and_usable_beside_it() -> None:
    model = make_model("one_layer")
    model.config.use_cache = True
    logits, before = run(model), snapshot(model)
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    compiled = build(model, None, backend="eager")
    for _ in range(2):  # in turn
        assert_unchanged(model, before)
        assert torch.equal(run(model), logits)
        assert_close(run(compiled), logits, 1e-5)
        assert torch.equal(compiled.generate(IDS, max_new_tokens=4, do_sample=False), generated)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), generated)
    compiled.adaskip.warmup(20)
    del compiled
    assert_unchanged(model, before)


def test_a_change_of_the_original_is_seen_by_the_snapshot() -> None:
    """The companion."""
    model = make_model("one_layer")
    changes: list[Any] = [
        lambda: setattr(model.config, "use_cache", not model.config.use_cache),
        lambda: model.set_attn_implementation("eager"),
        lambda: model.model.layers[0].mlp.train(),
        lambda: model.model.register_forward_hook(lambda *a: None),
        lambda: setattr(model.model, "extra", 1),
        lambda: model.lm_head.weight.data.mul_(1.0001),
        lambda: setattr(model, "lm_head", copy.deepcopy(model.lm_head)),
    ]
    for change in changes:
        before = snapshot(model)
        change()
        with pytest.raises(AssertionError):
            assert_unchanged(model, before)


def test_it_is_a_model_of_the_same_class(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    assert isinstance(compiled, LlamaForCausalLM)
    assert type(compiled).__name__ == "LlamaForCausalLM"
    assert compiled.config.to_dict() == model.config.to_dict()
    assert compiled.config is not model.config
    assert compiled.generation_config is not model.generation_config
    assert compiled.device == model.device
    assert compiled.dtype == model.dtype
    assert dict(compiled.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_every_tensor_is_shared(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        assert a is b
    for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
        assert a is b
    modules = {id(m) for m in model.modules()}
    assert not modules & {id(m) for m in compiled.modules()}


def test_tied_weights_stay_tied() -> None:
    model = make_model("tied")
    compiled = build(model, None, backend="eager")
    assert compiled.lm_head.weight is compiled.model.embed_tokens.weight is model.lm_head.weight


def test_an_update_in_place_is_seen_by_both(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    before = run(compiled)
    cache = compiled.adaskip.new_cache()
    run(compiled, past_key_values=cache)
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2.0)
    try:
        assert_close(run(compiled), run(model), 1e-5)
        with pytest.raises(AssertionError):
            assert_close(run(compiled), before, 1e-5)
        token = IDS[:, :1]  # in a request that has begun as well
        with torch.no_grad():
            decoded = compiled(token, past_key_values=cache).logits
            reference = model(torch.cat([IDS, token], 1), logits_to_keep=1).logits
        assert_close(decoded, reference, 1e-5)
    finally:
        with torch.no_grad():
            weight.div_(2.0)


def test_a_replaced_parameter_is_used_by_the_next_request(pair: tuple[Any, Any]) -> None:
    """As merging an adapter does; the original does not see it."""
    model, compiled = pair
    before = run(model)
    layer = compiled.model.layers[0].mlp
    old = layer.down_proj.weight
    cache = compiled.adaskip.new_cache()
    run(compiled, past_key_values=cache)
    layer.down_proj.weight = nn.Parameter(old.detach() * 3.0, requires_grad=False)
    try:
        reference = Oracle(model)
        reference.model.model.layers[0].mlp.down_proj.weight = layer.down_proj.weight
        expected = run(reference.model)
        assert_close(run(compiled), expected, 1e-5)
        with pytest.raises(AssertionError):
            assert_close(run(compiled), before, 1e-5)
        assert torch.equal(run(model), before)
    finally:
        layer.down_proj.weight = old
    assert_close(run(compiled), before, 1e-5)


@pytest.mark.parametrize("second", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_parameter_replaced_in_mid_request_is_refused_by_the_next_prompt(second: int) -> None:
    """A chunk or the next turn: what is stored was computed with another one. Decoding goes on."""
    model = make_model("one_layer")
    compiled, reference = build(model, None, backend="eager"), Oracle(model)
    cache, theirs = compiled.adaskip.new_cache(), DynamicCache(config=model.config)
    token = IDS[:, :1]
    with torch.no_grad():
        for ids in (IDS, IDS[:, :second], token):
            compiled(ids, past_key_values=cache, logits_to_keep=1)
            reference.step(ids, theirs)
        old = compiled.lm_head.weight
        compiled.lm_head.weight = nn.Parameter(old.detach() * 3.0)
        logits = compiled(token, past_key_values=cache).logits
        assert_close(logits, reference.step(token, theirs)[:, -1:], 1e-5)
        with pytest.raises(UnsupportedError, match=r"since this request began .*was replaced"):
            compiled(IDS[:, :4], past_key_values=cache, logits_to_keep=1)
        compiled.lm_head.weight = old
        logits = compiled(IDS[:, :4], past_key_values=cache, logits_to_keep=1).logits
        assert_close(logits, reference.step(IDS[:, :4], theirs)[:, -1:], 1e-5)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_parameter_of_another_layout_is_refused(pair: tuple[Any, Any], change: str) -> None:
    """The model itself does not run with it; a request is refused before it runs."""
    _, compiled = pair
    before = run(compiled)
    layer = compiled.model.layers[0].mlp
    old = layer.down_proj.weight
    other = old.detach()[:, :-1] if change == "shape" else old.detach().double()
    layer.down_proj.weight = nn.Parameter(other.clone(), requires_grad=False)
    try:
        with pytest.raises(UnsupportedError, match=r"down_proj.weight\), and does not run"):
            run(compiled)
    finally:
        layer.down_proj.weight = old
    assert torch.equal(run(compiled), before)


def test_training_mode_hooks_and_attention_are_each_models_own(pair: tuple[Any, Any]) -> None:
    model, compiled = pair
    before = snapshot(model)
    compiled.train()
    handle = compiled.model.register_forward_hook(lambda *a: None)
    compiled.config.use_cache = False
    assert_unchanged(model, before)
    handle.remove()
    compiled.eval()
    compiled.config.use_cache = True
    model.train()
    assert not compiled.training
    model.eval()


def test_moving_to_where_it_is_does_nothing(pair: tuple[Any, Any]) -> None:
    _, compiled = pair
    for same in (compiled.to("cpu"), compiled.float(), compiled.to(torch.float32)):
        assert same is compiled


def test_a_half_precision_original_makes_a_half_precision_model() -> None:
    """`to` changes parameters in place, and they are shared; the graphs follow."""
    model = make_model("one_layer")
    compiled = build(model, None, backend="eager")
    model.to(torch.bfloat16)
    assert compiled.dtype == torch.bfloat16
    logits = run(compiled)
    assert logits.dtype == torch.bfloat16
    assert_close(logits, run(model), 2e-2)
