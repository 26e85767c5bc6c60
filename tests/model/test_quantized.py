"""Weights in int8 (torchao's), compared with the eager model that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaskip_fx
from adaskip_fx import SkipPlan
from adaskip_fx.api import build
from adaskip_fx.data.reference_text import calibration_samples
from adaskip_fx.profiles.fingerprint import fingerprint, unusual_layers
from adaskip_fx.testing import assert_equivalent
from adaskip_fx.testing.equivalence import compiled_for
from tests.support.adapters import adapted, assert_same, differ, generated, llama, logits
from tests.support.tokenizers import Letters

quantization = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore::UserWarning:peft"
)


def quantized(model: Any) -> Any:
    """The same model, whose linear layers have weights in int8."""
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized(llama())


def test_under_a_plan(model: Any) -> None:
    assert assert_equivalent(model, decode_steps=2) < 1e-5
    plan = SkipPlan.of(compiled_for(model).adaskip.sublayers, ["1.attention", "0.ffn"])
    assert assert_equivalent(model, plan, decode_steps=2) < 1e-5
    assert generated(compiled_for(model)) != generated(model)  # under the plan


def test_quantized_after_it_was_compiled() -> None:
    model = llama()
    before = logits(model)
    fast = build(model, None, backend="eager")
    assert_same(fast, model)
    quantized(model)
    assert not torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    assert_same(fast, model)


@pytest.mark.slow
def test_quantized_in_the_compiled_model_alone(model: Any) -> None:
    plain = llama()
    before = logits(plain)
    fast = quantized(build(plain, None, backend="eager"))
    assert_same(fast, model)
    assert torch.equal(logits(plain), before)


@pytest.mark.slow
def test_with_adapters() -> None:
    model = adapted(model=quantized(llama()))
    fast = build(model, None, backend="eager")
    first = logits(model)
    assert_same(fast, model)
    model.set_adapter("second")
    assert_same(fast, model)
    assert differ(logits(model), first)


def test_a_profile_is_measured_and_fits_the_model_as_it_was(model: Any) -> None:
    texts = calibration_samples(None, 64, 1)
    profile = adaskip_fx.calibrate(model, Letters(), texts, max_length=64)
    profile.check(llama())
    assert profile.fingerprint.weights != fingerprint(llama()).weights
    other = fingerprint(quantized(llama(num_hidden_layers=3)))
    assert profile.fingerprint.digest != other.digest


def test_what_times_depend_on(model: Any) -> None:
    assert unusual_layers(llama()) == ""
    assert unusual_layers(model) == "15 Linear Int8Tensor"
    both = adapted()
    assert unusual_layers(both) == "4 peft.tuners.lora.layer.Linear"
    with both.disable_adapter():
        assert unusual_layers(both) == ""
