"""ShortGPT: block influence of whole layers, measured and ranked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaskip_fx
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.policies import ShortGPT
from adaskip_fx.profiles.profile import Fingerprint, Profile, ProfileError
from adaskip_fx.runtime.similarity import measure_prompt
from tests.support.compiled_llamas import make_model
from tests.support.eager_reference import moments, plain_streams
from tests.support.profiles import layers_of, profile
from tests.support.tokenizers import Letters, ids_of

TEXTS = ("Sixteen letters and some more.", "A second sample that is longer than the first is.")


def with_layers(similarity: list[float]) -> Profile:
    """A profile whose layers have these similarities, whatever their sublayers have."""
    plain = profile(len(similarity))
    layers = np.array([[(4 * value, 4.0, 4.0, 4.0, 4.0) for value in similarity]])
    return Profile(plain.sublayers, plain.statistics, plain.fingerprint, {}, {}, layers)


def test_choices() -> None:
    measured = with_layers([0.2, 0.99, 0.5, 0.97, 0.9, 0.98])
    assert layers_of(ShortGPT().plan(measured, 1.5)) == [1, 5]
    assert layers_of(ShortGPT(protected=True).plan(measured, 1.5)) == [3, 4]
    assert layers_of(ShortGPT().plan(with_layers([0.9] * 4), 2.0)) == [0, 1]
    assert not ShortGPT().plan(measured, 1.5).surrogates.factors
    scaled = ShortGPT(scaled=True).plan(measured, 1.5)
    assert set(scaled.surrogates.factors.values()) == {0.75}


def test_refusals() -> None:
    with pytest.raises(ProfileError, match="measured before whole layers were; calibrate again"):
        ShortGPT().plan(profile(4), 1.5)
    message = "alpha 2.0 skips 2 of 4 layers, but ShortGPT may skip 1: take a smaller alpha"
    with pytest.raises(ValueError, match=message):
        ShortGPT(protected=True).plan(with_layers([0.5] * 4), 2.0)
    layers = with_layers([0.5] * 4).layers
    assert layers is not None
    plain = profile(4)
    for bad, text in (
        (layers[:, :3], r"layers have shape \[1, 3, 5\], expected \[1 samples, 4 layers, 5\]"),
        (layers * np.nan, "layer 0: not finite, or no tokens, in sample 0"),
    ):
        with pytest.raises(ProfileError, match=text):
            Profile(plain.sublayers, plain.statistics, plain.fingerprint, {}, {}, bad)


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Profile]:
    model = make_model("three_layers")
    return model, adaskip_fx.calibrate(model, Letters(), TEXTS, max_length=96)


def test_calibration_measures_what_hooks_on_the_plain_model_see(measured: Any) -> None:
    model, found = measured
    cosines, tokens = np.zeros(3), 0
    for text in TEXTS:
        streams = plain_streams(model, ids_of(text))
        for layer in range(3):
            before, after = streams[f"{layer}.attention"][0], streams[f"{layer}.ffn"][1]
            cosines[layer] += float(moments(before, after)[0, 0])
        tokens += ids_of(text).shape[1]
    np.testing.assert_allclose(found.layer_similarity(), cosines / tokens, rtol=1e-5)
    by_sublayers = found.similarity().reshape(3, 2).prod(axis=1)
    assert not np.allclose(found.layer_similarity(), by_sublayers, rtol=1e-3), "it is no product"


def test_sublayers_are_measured_as_without_layers(measured: Any) -> None:
    model, found = measured
    runtime = runtime_of(adaskip_fx.api.build(model, None, backend="eager"))
    for row, text in enumerate(TEXTS):
        alone = measure_prompt(runtime, ids_of(text))[:, 0].double().numpy()
        np.testing.assert_array_equal(found.statistics[row], alone)
        with torch.no_grad():
            assert measure_prompt(runtime, ids_of(text), layers=True).shape == (6 + 3, 1, 5)


def test_saved_and_loaded(measured: Any, tmp_path: Path) -> None:
    _, found = measured
    found.save(tmp_path / "new")
    loaded = Profile.load(tmp_path / "new")
    np.testing.assert_array_equal(loaded.layers, found.layers)
    assert loaded.digest == found.digest
    about = found.fingerprint, found.versions, found.calibration
    old = Profile(found.sublayers, found.statistics, *about)
    assert old.digest != found.digest
    old.save(tmp_path / "old")  # as it was written before there were layers
    assert Profile.load(tmp_path / "old").layers is None
    assert isinstance(found.fingerprint, Fingerprint)
