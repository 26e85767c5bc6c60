"""`calibrate` measures what hooks on the plain model measure, in float64."""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import adaskip_fx
from adaskip_fx import Profile
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.runtime.similarity import measure_prompt
from tests.support.compiled_llamas import entry, make_model
from tests.support.eager_reference import moments, plain_streams
from tests.support.tokenizers import LIMIT, Letters, ids_of

TEXTS = (
    "A decoder adds to its residual stream, twice a layer.",
    "What changes it least is left out first: " * 4,
    "sixteen letters.",
)
MODULE = importlib.import_module("adaskip_fx.calibration.calibrate")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("three_layers")


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def profile(model: Any, progress: list[tuple[int, int]]) -> Profile:
    def tell(done: int, total: int) -> None:
        progress.append((done, total))

    return adaskip_fx.calibrate(model, Letters(), TEXTS, LIMIT, progress=tell)


@pytest.fixture(scope="module")
def expected(model: Any) -> np.ndarray[Any, Any]:
    """[samples, sublayers, 5]: the float64 sums over each sample's tokens."""
    samples = []
    for text in TEXTS:
        streams = plain_streams(model, ids_of(text))
        samples.append(torch.stack([moments(*stream)[0] for stream in streams.values()]))
    return torch.stack(samples).numpy()


def test_the_sums_are_those_of_plain_hooks(
    profile: Profile, expected: np.ndarray[Any, Any]
) -> None:
    assert profile.statistics.shape == (3, 6, 5)
    np.testing.assert_allclose(profile.statistics, expected, rtol=1e-5)
    np.testing.assert_array_equal(profile.statistics[:, :, 4], [[53] * 6, [96] * 6, [16] * 6])
    assert profile.tokens == 53 + 96 + 16


def test_similarity_and_scale_are_the_papers_averages(model: Any, profile: Profile) -> None:
    """Written out token by token, over all tokens of all samples (eq. 2 and 3)."""
    cosines: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for text in TEXTS:
        for name, (before, after) in plain_streams(model, ids_of(text)).items():
            for a, b in zip(before[0].double(), after[0].double(), strict=True):
                cosines.setdefault(name, []).append(float(a @ b / (a.norm() * b.norm())))
                ratios.setdefault(name, []).append(float(b.norm() / a.norm()))
    assert [str(s) for s in profile.sublayers] == list(cosines)
    means = [float(np.mean(v)) for v in cosines.values()]
    np.testing.assert_allclose(profile.similarity(), means, rtol=1e-5)
    np.testing.assert_allclose(profile.scale(), [np.mean(v) for v in ratios.values()], rtol=1e-5)
    assert max(means) - min(means) > 0.05, "the sublayers differ"


def test_the_released_variant_averages_samples(model: Any, profile: Profile) -> None:
    """Each sample counts once, and its scale is of whole-tensor norms."""
    cosines, scales = [], []
    for text in TEXTS:
        streams = plain_streams(model, ids_of(text)).values()
        pairs = [(a.double(), b.double()) for a, b in streams]
        cosines.append([torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairs])
        scales.append([(b.norm() / a.norm()).item() for a, b in pairs])
    np.testing.assert_allclose(profile.similarity("released"), np.mean(cosines, 0), rtol=1e-5)
    np.testing.assert_allclose(profile.scale("released"), np.mean(scales, 0), rtol=1e-5)


def test_another_stream_would_be_seen(profile: Profile, expected: np.ndarray[Any, Any]) -> None:
    """The companion: one sublayer off, one sample's order, or one token less."""
    for wrong in (
        np.roll(expected, 1, axis=1),
        expected[::-1],
        expected - np.eye(5)[4],
        expected * np.array([1.0001, 1, 1, 1, 1]),
    ):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(profile.statistics, wrong, rtol=1e-5)


def test_progress_is_told(profile: Profile, progress: list[tuple[int, int]]) -> None:
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_is_written_down(model: Any, profile: Profile) -> None:
    joined = b"".join(ids_of(text).numpy().astype("<i8").tobytes() + b"|" for text in TEXTS)
    assert profile.calibration == {
        "samples": 3,
        "max_length": LIMIT,
        "tokenizer": "letters",
        "tokens_sha256": hashlib.sha256(joined).hexdigest(),
        "dtype": "float32",
    }
    assert profile.versions == {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert profile.fingerprint == fingerprint(model)
    profile.check(model)


def test_the_model_is_left_alone(model: Any) -> None:
    before = copy.deepcopy(model.config.to_dict())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    adaskip_fx.calibrate(model, Letters(), TEXTS[2:], LIMIT)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes


def test_any_iterable_of_texts(profile: Profile, model: Any) -> None:
    def lazily() -> Iterator[str]:
        yield from TEXTS

    again = adaskip_fx.calibrate(model, Letters(), lazily(), LIMIT)
    assert again.digest == profile.digest


def test_the_profile_goes_on_to_a_plan(model: Any, profile: Profile, tmp_path: Any) -> None:
    """Saved, loaded by `compile` from its path: the least changing sublayers are skipped."""
    profile.save(tmp_path / "tiny.adaskip")
    compiled = adaskip_fx.compile(model, tmp_path / "tiny.adaskip", 1.5, backend="eager")
    ranking = np.argsort(-profile.similarity(), kind="stable")[:2]  # floor(6 / 3 + 1/2)
    plan = compiled.adaskip.plan
    assert set(plan.skipped("prefill")) == {profile.sublayers[i] for i in ranking}
    for index in ranking:
        factor = plan.surrogates.factor(profile.sublayers[index])
        assert factor == pytest.approx(float(profile.scale()[index]), rel=1e-12)


def test_measuring_a_model_that_skips_measures_the_full_one() -> None:
    """`measure` of a compiled model with a plan: the plan is not in the way."""
    bank = entry("three_layers")
    ids = bank.tokens(1, 9)
    with bank.using(bank.plan(["0.attention", "1.ffn"])):
        measured = measure_prompt(bank.runtime, ids)
    streams = plain_streams(bank.model, ids)
    assert len(measured) == 6
    for reading, stream in zip(measured, streams.values(), strict=True):
        torch.testing.assert_close(reading.double(), moments(*stream), rtol=1e-5, atol=0)


# Vectors without a direction, and padding --------------------------------------------------------


class Padding(Letters):
    """A tokenizer that pads to 40 tokens with token 0, before the text or after it."""

    def __init__(self, masked: bool, side: str = "left") -> None:
        super().__init__()
        self.masked, self.side = masked, side

    def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
        ids = super().__call__(text, **options)["input_ids"]
        more = 40 - ids.shape[1]
        width = (more, 0) if self.side == "left" else (0, more)
        padded = {"input_ids": torch.nn.functional.pad(ids, width)}
        if self.masked:
            padded["attention_mask"] = torch.nn.functional.pad(torch.ones_like(ids), width)
        return padded


SHORT = ("thirty letters, spaces as well", "twenty-five of them, here")


@pytest.fixture(scope="module")
def padless() -> Any:
    """A model whose padding token has an embedding of zero, as transformers makes it."""
    model = make_model("one_layer")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    return model


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_masked_padding_is_no_part_of_a_text(padless: Any, side: str) -> None:
    found = adaskip_fx.calibrate(padless, Padding(True, side), SHORT, LIMIT)
    plain = adaskip_fx.calibrate(padless, Letters(), SHORT, LIMIT)
    np.testing.assert_array_equal(found.statistics, plain.statistics)
    assert found.calibration["tokens_sha256"] == plain.calibration["tokens_sha256"]
    assert found.left_out is None
    assert found.tokens == 55


def test_padding_that_is_not_masked_decides_nothing(padless: Any) -> None:
    """Its zero vectors are left out where the stream is still zero, counted, and in no factor."""
    found = adaskip_fx.calibrate(padless, Padding(False, "right"), SHORT, LIMIT)
    first = found.sublayers[0]
    assert found.left_out_tokens == {first: 25}
    assert found.tokens == 80
    plain = adaskip_fx.calibrate(padless, Letters(), SHORT, LIMIT)
    np.testing.assert_allclose(found.statistics[:, 0], plain.statistics[:, 0], rtol=1e-5)
    assert 0.1 < float(found.scale()[0]) < 10
    adaskip_fx.AdaSkip().plan(found, 1.5)
    # the companion: later sublayers see what attention made of the padding, and it does count
    assert not np.allclose(found.statistics[:, 1], plain.statistics[:, 1], rtol=1e-2)
    assert np.isfinite(found.layers).all()
    assert found.layers is not None
    assert found.layers[:, 0, 4].tolist() == [30, 25]


@pytest.mark.parametrize(
    ("value", "spoiled"),
    [
        pytest.param(0.0, 29, marks=pytest.mark.slow),
        (float("nan"), 57),
        pytest.param(float("inf"), 57, marks=pytest.mark.slow),
    ],
)
def test_a_text_of_which_little_counts_is_refused_by_name(value: float, spoiled: int) -> None:
    """Attention hands NaN and Inf on to every token, a zero to none."""
    model = make_model("one_layer")
    with torch.no_grad():
        model.model.embed_tokens.weight[3 + ord("!") % 50] = value
    text = "five words, and then nothing" + "!" * 29
    with pytest.raises(ValueError, match="calibration text 1") as caught:
        adaskip_fx.calibrate(model, Letters(), [SHORT[0], text], LIMIT)
    assert str(caught.value) == (
        f"calibration text 1: at 0.attention the residual stream of {spoiled} of its 57 tokens is "
        "zero or not finite, so nothing can be learned there. Leave the text out, or load the "
        "model in a wider dtype (bfloat16 or float32 instead of float16) if it overflows"
    )
    if value == 0:  # the companion: one less, and more than half counts
        less = adaskip_fx.calibrate(model, Letters(), [SHORT[0], text[:-1]], LIMIT)
        assert less.left_out_tokens[less.sublayers[0]] == 28
        adaskip_fx.AdaSkip().plan(less, 1.5)


# Refused ----------------------------------------------------------------------------------------

CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"texts": []}, ValueError, "no calibration text was given; pass at least one text"),
    ({"texts": TEXTS[0]}, TypeError, "texts must be a sequence of texts, not one string"),
    (
        {"texts": [TEXTS[0], "fifteen letters"]},
        ValueError,
        "calibration text 1 has 15 tokens; at least 16 are needed",
    ),
    ({"texts": TEXTS, "max_length": 601}, ValueError, "601 is more than the model's 600 positions"),
    ({"texts": ["", TEXTS[0]]}, ValueError, "calibration text 0 has 0 tokens"),
    ({"texts": TEXTS, "max_length": 0}, ValueError, "max_length 0"),
]


@pytest.mark.parametrize(("given", "error", "message"), CASES)
def test_bad_texts_are_refused_before_anything_is_captured(
    model: Any,
    given: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "build", _never)
    with pytest.raises(error, match=message):
        adaskip_fx.calibrate(model, Letters(), **{"max_length": LIMIT, **given})


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("captured")


def test_good_texts_get_as_far_as_the_capture(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(MODULE, "build", _never)
    with pytest.raises(AssertionError, match="captured"):
        adaskip_fx.calibrate(model, Letters(), TEXTS, LIMIT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.train(), ValueError, "training mode"),
        (lambda m: m.model, TypeError, "no language-model head"),
        (lambda m: m.lm_head, TypeError, "expected a transformers PreTrainedModel"),
    ],
)
def test_a_bad_model_is_refused(
    change: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adaskip_fx.calibrate(change(make_model("one_layer")), Letters(), TEXTS, LIMIT)
