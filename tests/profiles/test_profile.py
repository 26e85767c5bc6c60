"""Profiles: averages against token-by-token loops, files that survive crashes, fingerprints."""

from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import LlamaConfig, LlamaForCausalLM

import adaskip_fx.plans.skip_plan
import adaskip_fx.plans.surrogates
import adaskip_fx.plans.tables
import adaskip_fx.plans.validation
import adaskip_fx.policies.adaskip
import adaskip_fx.profiles.folder
import adaskip_fx.profiles.profile
import adaskip_fx.profiles.validation
from adaskip_fx.plans.skip_plan import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import AdaSkip
from adaskip_fx.profiles.profile import (
    PROBE_STATS,
    SANE_FACTORS,
    Fingerprint,
    Profile,
    ProfileError,
    Variant,
    fingerprint,
)

PROPERTY = settings(deadline=None)  # a shared machine may stall
TOY = Fingerprint("0123456789abcdef", "toy", 1234567, "f" * 16)
NAMES = tuple(map(Sublayer.parse, ["0.attention", "0.ffn", "1.attention", "1.ffn"]))


def profile(seed: int = 0, samples: int = 2, **changes: Any) -> Profile:
    statistics = np.random.default_rng(seed).uniform(0.5, 1.0, (samples, len(NAMES), 5))
    statistics[:, :, 4] = 7
    fields = {
        "sublayers": NAMES,
        "statistics": statistics,
        "fingerprint": TOY,
        "versions": {"torch": "2.13"},
        "calibration": {"texts": 2, "tokenizer": "toy", "nested": {"lengths": [7, 7]}},
    }
    return Profile(**{**fields, **changes})


def same(one: Profile, two: Profile) -> bool:
    """Every field, bit by bit."""
    about = ("sublayers", "fingerprint", "versions", "calibration")
    return one.statistics.tobytes() == two.statistics.tobytes() and all(
        getattr(one, name) == getattr(two, name) for name in about
    )


# Averages --------------------------------------------------------------------------------------

Vector = list[float]
Sample = list[tuple[Vector, Vector]]  # one (before, after) per token


def norm(v: Vector) -> float:
    return math.sqrt(sum(x * x for x in v))


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def draw_streams(seed: int) -> list[list[Sample]]:
    """[sample][sublayer][token] of (a, b); samples have unequal lengths on purpose."""
    source = random.Random(seed)

    def vector() -> Vector:
        return [source.gauss(0, 1) for _ in range(5)]

    return [[[(vector(), vector()) for _ in range(tokens)] for _ in NAMES] for tokens in (1, 2, 11)]


def measured(streams: list[list[Sample]]) -> Profile:
    def sums(tokens: Sample) -> list[float]:
        per_token = [
            (cosine(a, b), norm(b) / norm(a), norm(a) ** 2, norm(b) ** 2, 1) for a, b in tokens
        ]
        return [sum(column) for column in zip(*per_token, strict=True)]

    return profile(statistics=np.array([[sums(tokens) for tokens in sample] for sample in streams]))


@pytest.mark.parametrize("seed", range(5))
def test_averages_of_the_paper(seed: int) -> None:
    """Eq. 2 and 3: one mean over all tokens of all samples."""
    streams = draw_streams(seed)
    result = measured(streams)
    for k in range(len(NAMES)):
        tokens = [pair for sample in streams for pair in sample[k]]
        similarity = sum(cosine(a, b) for a, b in tokens) / len(tokens)
        scale = sum(norm(b) / norm(a) for a, b in tokens) / len(tokens)
        assert result.similarity()[k] == pytest.approx(similarity, rel=1e-12)
        assert result.scale()[k] == pytest.approx(scale, rel=1e-12)
    assert result.tokens == 14


@pytest.mark.parametrize("seed", range(5))
def test_averages_of_the_released_code(seed: int) -> None:
    """A mean per sample, then over samples; norms of the whole sample as one tensor."""
    streams = draw_streams(seed)
    result = measured(streams)
    for k in range(len(NAMES)):
        similarity, scale = 0.0, 0.0
        for sample in streams:
            similarity += sum(cosine(a, b) for a, b in sample[k]) / len(sample[k]) / len(streams)
            before = [x for a, _ in sample[k] for x in a]
            after = [x for _, b in sample[k] for x in b]
            scale += norm(after) / norm(before) / len(streams)
        assert result.similarity("released")[k] == pytest.approx(similarity, rel=1e-12)
        assert result.scale("released")[k] == pytest.approx(scale, rel=1e-12)


def test_variants_differ_when_lengths_do() -> None:
    result = measured(draw_streams(0))
    assert not np.allclose(result.similarity(), result.similarity("released"), rtol=1e-3)
    assert not np.allclose(result.scale(), result.scale("released"), rtol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_compensation_is_the_scale_of_every_sublayer(variant: Variant) -> None:
    result = measured(draw_streams(1))
    expected = dict(zip(NAMES, map(float, result.scale(variant)), strict=True))
    assert result.scales(variant) == Surrogates.scale(expected)


def test_compensation_refuses_a_dead_stream_by_name() -> None:
    statistics = profile().statistics.copy()
    statistics[1, 2, PROBE_STATS.index("before_squared")] = 0
    broken = profile(statistics=statistics)
    assert broken.scales("paper").factors  # near miss: the paper needs no |a|^2
    with pytest.raises(ValueError, match=r"scale factor of 1\.attention"):
        broken.scales("released")


@pytest.mark.parametrize(("factor", "shown"), [(7.6e33, "7.6e+33"), (1.1e4, "1.1e+04"), (0.0, "0")])
def test_a_senseless_factor_is_refused_by_name(factor: float, shown: str) -> None:
    """Where `compile` asks for it; the profile itself can be loaded, looked at and compared."""
    statistics = profile().statistics.copy()
    statistics[:, 2, PROBE_STATS.index("ratio")] = factor * 7
    broken = profile(statistics=statistics)
    assert float(broken.scale()[2]) == pytest.approx(factor)
    with pytest.raises(ProfileError) as caught:
        AdaSkip().plan(broken, 2)
    assert str(caught.value) == (
        f"scale factor of 1.attention is {shown} in this profile, and no sublayer can be replaced "
        "by one outside of 0.0001 to 10000: the stream of some token was almost zero, or grew "
        "beyond measure. Calibrate again, on texts without padding or unknown tokens, or in a "
        "wider dtype"
    )


@pytest.mark.parametrize("factor", SANE_FACTORS)
def test_factors_at_the_bounds_are_taken(factor: float) -> None:
    statistics = profile().statistics.copy()
    statistics[:, 2, PROBE_STATS.index("ratio")] = factor * 7
    found = profile(statistics=statistics).scales().factor(NAMES[2])
    assert found == pytest.approx(factor)


def test_unknown_variant() -> None:
    for method in (profile().similarity, profile().scale, profile().scales):
        with pytest.raises(ValueError, match="unknown variant 'fast': use 'paper' or 'released'"):
            method(cast(Variant, "fast"))


# Construction ----------------------------------------------------------------------------------


def test_statistics_are_copied_and_read_only() -> None:
    statistics = np.ones((1, 4, 5))
    one = profile(statistics=statistics)
    statistics[:] = 9
    assert (one.statistics == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        one.statistics[0, 0, 0] = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.statistics = statistics  # type: ignore[misc]
    with pytest.raises(TypeError):
        one.versions["torch"] = "3"  # type: ignore[index]


def test_a_description_is_copied() -> None:
    lengths = [7, 7]
    one = profile(calibration={"lengths": lengths})
    before = one.digest
    lengths.append(8)
    assert one.calibration == {"lengths": [7, 7]}
    assert one.digest == before


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (2, 4, 4), (2, 5, 4), (1, 2, 4, 5)])
def test_shape_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProfileError, match=r"statistics have shape .* expected \[samples, 4 sub"):
        profile(statistics=np.ones(shape))


def test_empty_is_refused() -> None:
    with pytest.raises(ProfileError, match="statistics are empty"):
        profile(statistics=np.ones((0, 4, 5)))
    with pytest.raises(ProfileError, match="statistics are empty"):
        profile(sublayers=(), statistics=np.ones((1, 0, 5)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("statistic", range(5))
def test_statistics_must_be_finite(bad: float, statistic: int) -> None:
    statistics = np.ones((3, 4, 5))
    statistics[2, 1, statistic] = bad
    with pytest.raises(ProfileError, match=r"^0\.ffn: not finite in sample 2$"):
        profile(statistics=statistics)


@pytest.mark.parametrize("tokens", [0, -1])
def test_every_sublayer_needs_tokens(tokens: int) -> None:
    statistics = np.ones((3, 4, 5))
    statistics[1, 3, PROBE_STATS.index("tokens")] = tokens
    with pytest.raises(ProfileError, match=r"^1\.ffn: no tokens in sample 1$"):
        profile(statistics=statistics)


@pytest.mark.parametrize("bad", [{"x": object()}, {"x": math.nan}, 5])
def test_description_must_be_json(bad: Any) -> None:
    with pytest.raises(ProfileError, match="calibration must be an object that JSON can hold"):
        profile(calibration=bad)


def test_digest_is_the_content() -> None:
    one = profile()
    assert one.digest == profile().digest
    statistics = one.statistics.copy()
    statistics[0, 0, 0] = math.nextafter(statistics[0, 0, 0], 2)
    for other in (
        profile(statistics=statistics),
        profile(versions={"torch": "2.14"}),
        profile(calibration={}),
        profile(sublayers=NAMES[::-1]),
        profile(fingerprint=dataclasses.replace(TOY, digest="0" * 16)),
    ):
        assert other.digest != one.digest


def test_profile_can_be_copied() -> None:
    one = profile(left_out=LEFT_OUT)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert same(twin, one)
        assert twin == one
        assert hash(twin) == hash(one)
        assert twin.left_out_tokens == one.left_out_tokens


def test_profiles_are_equal_by_content() -> None:
    statistics = profile().statistics.copy()
    assert profile() == profile(statistics=statistics)
    assert len({profile(), profile(statistics=statistics)}) == 1
    statistics[0, 0, 0] = math.nextafter(statistics[0, 0, 0], 2)
    for other in (profile(statistics=statistics), profile(left_out=LEFT_OUT), profile().digest):
        assert profile() != other


LEFT_OUT = np.array([[0.0, 3, 0, 1], [0, 1, 0, 0]])


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    one = profile(left_out=LEFT_OUT)
    assert one.left_out_tokens == {NAMES[1]: 4, NAMES[3]: 1}
    assert str(one).endswith("\nleft out, of length zero or not finite: 0.ffn 4, 1.ffn 1")
    one.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert loaded == one
    assert loaded.left_out_tokens == one.left_out_tokens
    first = LEFT_OUT.copy()
    first[:, 0] = 2
    assert profile(left_out=first).tokens == profile().tokens + 4  # they were valid


def test_where_nothing_is_left_out_the_file_is_as_before(tmp_path: Path) -> None:
    one = profile(left_out=np.zeros((2, 4)))
    assert one.left_out is None
    assert one == profile()
    assert one.left_out_tokens == {}
    assert "left out" not in str(one)
    one.save(tmp_path / "p")
    (file,) = (tmp_path / "p").glob("moments-*")
    assert list(safetensors.numpy.load(file.read_bytes())) == ["moments"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((2, 3)), r"left_out has shape \[2, 3\], expected \[2, 4\], \[samples, subl"),
        (np.full((2, 4), -1.0), "left_out has a number that is negative or not finite"),
        (np.full((2, 4), math.nan), "left_out has a number that is negative or not finite"),
    ],
)
def test_what_is_left_out_is_checked(bad: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profile(left_out=bad)


def test_table() -> None:
    statistics = np.ones((2, 3, 5)) * [300.0, 330.0, 1.0, 1.0, 600.0]
    statistics[:, 1, 0] = -60
    names = tuple(map(Sublayer.parse, ["9.attention", "9.ffn", "10.mixer"]))
    one = profile(sublayers=names, statistics=statistics)
    assert str(one).splitlines() == [
        f"Profile {one.digest[:8]}: toy, 1,200 tokens in 2 samples",
        "layer | attention similarity | ffn similarity    | mixer similarity",
        "    9 | 0.5000 (×0.5500)     | -0.1000 (×0.5500) |",  # noqa: RUF001
        "   10 |                      |                   | 0.5000 (×0.5500)",  # noqa: RUF001
    ]


# Files -----------------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=5)


@settings(PROPERTY, max_examples=40)
@given(
    hnp.arrays(np.float64, (1, 4, 5), elements=FINITE, fill=st.just(0.1)),
    st.dictionaries(TEXTS, TEXTS, max_size=3),
    st.dictionaries(TEXTS, FINITE | TEXTS | st.none() | st.lists(st.integers()), max_size=3),
)
def test_save_and_load(
    statistics: Any, versions: dict[str, str], calibration: dict[str, Any]
) -> None:
    statistics[:, :, 4] = 1
    one = profile(statistics=statistics, versions=versions, calibration=calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "new", "profile")
        one.save(path)
        again = Profile.load(str(path))
    assert same(again, one)
    assert again.digest == one.digest


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("moments-*")
    return file


def test_folder_format(tmp_path: Path) -> None:
    profile().save(tmp_path)
    file = tensor_file(tmp_path)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sorted(os.listdir(tmp_path)) == [f"moments-{sha256[:16]}.safetensors", "profile.json"]
    data = json.loads((tmp_path / "profile.json").read_text())
    assert data == {
        "schema": 1,
        "digest": profile().digest,
        "fingerprint": dataclasses.asdict(TOY),
        "sublayers": ["0.attention", "0.ffn", "1.attention", "1.ffn"],
        "versions": {"torch": "2.13"},
        "calibration": {"texts": 2, "tokenizer": "toy", "nested": {"lengths": [7, 7]}},
        "tensors": {"file": file.name, "sha256": sha256},
    }
    loaded = safetensors.numpy.load(file.read_bytes())["moments"]
    assert loaded.dtype == np.float64
    assert (loaded == profile().statistics).all()


def test_saving_again_replaces(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder = tmp_path / "profile"
    for seed in (0, 1, 1):
        profile(seed).save(folder)
        assert same(Profile.load(folder), profile(seed))
        assert len(os.listdir(folder)) == 2
    (folder / "notes.txt").write_text("mine too")
    profile(2).save(folder)
    assert (folder / "notes.txt").read_text() == "mine too"


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ProfileError, match="is a file, but a profile is a folder") as caught:
        profile().save(file)
    assert str(caught.value).startswith(f"{file}: ")
    with pytest.raises(ProfileError, match=r"holds other files \(notes\.txt\).*choose a new or"):
        profile().save(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such folder; check the path, or calibrate again"):
        Profile.load(tmp_path / "nothing")
    with pytest.raises(ProfileError, match=r"profile\.json: no such file; check the path, or"):
        Profile.load(tmp_path)
    profile().save(tmp_path)
    file = tensor_file(tmp_path)
    file.unlink()
    with pytest.raises(ProfileError, match=r"cannot be read \(No such file.*copy the whole folde"):
        Profile.load(tmp_path)


def test_damaged_tensor_file(tmp_path: Path) -> None:
    profile().save(tmp_path)
    file = tensor_file(tmp_path)
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (b"", whole[:8], whole[:-1], whole + b"\0", flipped):
        file.write_bytes(damaged)
        with pytest.raises(ProfileError, match="truncated or edited") as caught:
            Profile.load(tmp_path)
        assert str(caught.value).startswith(f"{file}: ")
    file.write_bytes(whole)
    assert same(Profile.load(tmp_path), profile())


def test_truncated_document(tmp_path: Path) -> None:
    profile().save(tmp_path)
    document = tmp_path / "profile.json"
    whole = document.read_bytes()
    for size in range(0, len(whole), 7):
        document.write_bytes(whole[:size])
        with pytest.raises(ProfileError, match=r"truncated or not JSON.*calibrate again") as caught:
            Profile.load(tmp_path)
        assert str(caught.value).startswith(f"{document}: ")


EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(schema=2), r"schema 2 is newer than this version reads \(1\); upgrade"),
    (lambda d: d.pop("schema"), "no schema number"),
    (lambda d: d.pop("versions"), "missing versions; calibrate again"),
    (lambda d: (d.pop("tensors"), d.pop("digest")), "missing digest, tensors"),
    (lambda d: d.update(tensors=None), "does not name its tensor file"),
    (lambda d: d["tensors"].update(file="../../secret"), "does not name its tensor file"),
    (lambda d: d["sublayers"].pop(), "statistics have shape .2, 4, 5., expected .samples, 3 sub"),
    (lambda d: d.update(sublayers=["x"]), "'x' is not a sublayer"),
    (lambda d: d.update(sublayers=3), "not a valid profile"),
    (lambda d: d.update(calibration=3), "calibration must be an object"),
    (lambda d: d.update(fingerprint=[]), "not a valid profile"),
    (lambda d: d["fingerprint"].pop("weights"), "not a valid profile .*weights"),
    (lambda d: d["fingerprint"].update(digest="0" * 16), "edited after it was saved"),
    (lambda d: d["calibration"].update(texts=3), "edited after it was saved"),
    (lambda d: d["sublayers"].reverse(), "edited after it was saved"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_bad_documents_are_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    profile().save(tmp_path)
    document = tmp_path / "profile.json"
    data = json.loads(document.read_text())
    document.write_text(json.dumps(data))
    Profile.load(tmp_path)  # near miss: the same content, only laid out in another way
    edit(data)
    document.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=message) as caught:
        Profile.load(tmp_path)
    assert str(caught.value).startswith(f"{document}: ")


@pytest.mark.parametrize("content", [b"nonsense", safetensors.numpy.save({"other": np.ones(3)})])
def test_a_tensor_file_without_moments(tmp_path: Path, content: bytes) -> None:
    """Consistent hashes, so only the content itself is wrong."""
    profile().save(tmp_path)
    sha256 = hashlib.sha256(content).hexdigest()
    file = tmp_path / f"moments-{sha256[:16]}.safetensors"
    file.write_bytes(content)
    document = tmp_path / "profile.json"
    data = json.loads(document.read_text())
    data["tensors"] = {"file": file.name, "sha256": sha256}
    document.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match="holds no moments"):
        Profile.load(tmp_path)


# Crashes ---------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception, so that nothing in between can take it for an ordinary error."""


class HalfWritten:
    """A file whose write stops in the middle when the fault falls on it."""

    def __init__(self, file: Any, step: Callable[[], None]) -> None:
        self.file, self.step = file, step

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        try:
            self.step()
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        self.file.write(data)


@contextmanager
def fault(at: int, error: BaseException, *, dead: bool) -> Iterator[list[str]]:
    """Raise `error` at call number `at` into the system; when `dead`, at every later one too."""
    calls: list[str] = []

    def step(name: str) -> None:
        calls.append(name)
        if len(calls) - 1 == at or (dead and len(calls) - 1 > at):
            raise error

    def wrap(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            step(name)
            result = real(*args, **kwargs)
            return HalfWritten(result, lambda: step("write")) if name == "open" else result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", wrap("open", builtins.open))
        for name in ("mkdir", "fsync", "replace", "unlink"):
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield calls


ONE_FILE = ["open", "write", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("dead", [True, False])
def test_a_crash_while_replacing_leaves_a_whole_profile(tmp_path: Path, dead: bool) -> None:
    old, new = profile(0), profile(1)
    error = Crash() if dead else OSError("disk full")
    found: list[str] = []
    for at in itertools.count():
        folder = tmp_path / str(at)
        old.save(folder)
        try:
            with fault(at, error, dead=dead) as calls:
                new.save(folder)
            finished = True
        except (Crash, OSError):
            finished = False
        loaded = Profile.load(folder)
        assert same(loaded, old) or same(loaded, new)
        found.append("new" if same(loaded, new) else "old")
        assert not finished or found[-1] == "new"
        assert dead or not any(name.endswith(".tmp") for name in os.listdir(folder))
        new.save(folder)  # the next save works and tidies up
        assert same(Profile.load(folder), new)
        assert len(os.listdir(folder)) == 2
        if finished and len(calls) <= at:
            break
    assert calls == ["mkdir", *ONE_FILE, *ONE_FILE, "unlink"]
    # The switch is at the second replace (call 9): up to it the old profile, after it the new.
    expected = ["old"] * 10 + ["new"] * 3
    if not dead:  # a lone failure of these harms nothing, and the save goes on
        expected[0] = expected[5] = "new"
    assert found == expected


def test_a_crash_while_saving_first_leaves_nothing_or_a_whole_profile(tmp_path: Path) -> None:
    new, outcomes = profile(1), []
    for at in itertools.count():
        folder = tmp_path / str(at)
        try:
            with fault(at, Crash(), dead=True) as calls:
                new.save(folder)
        except Crash:
            pass
        try:
            assert same(Profile.load(folder), new)
            outcomes.append("new")
        except ProfileError as refused:
            outcomes.append("none" if "no such" in str(refused) else str(refused))
        new.save(folder)  # what a crash left is not taken for somebody else's folder
        assert same(Profile.load(folder), new)
        assert len(os.listdir(folder)) == 2
        if len(calls) <= at:
            break
    assert outcomes == ["none"] * 10 + ["new"] * 2


# Fingerprint -----------------------------------------------------------------------------------


def llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **changes}))


@pytest.fixture(scope="module")
def base() -> Fingerprint:
    return fingerprint(llama())


@pytest.mark.parametrize("head", ["SequenceClassification", "QuestionAnswering"])
def test_a_decoder_has_one_fingerprint_under_any_head(base: Fingerprint, head: str) -> None:
    config = llama().config
    config.num_labels = 3
    model = getattr(transformers, f"LlamaFor{head}")(config)
    assert fingerprint(model).digest == base.digest
    assert fingerprint(model.base_model).digest == base.digest
    config.intermediate_size += 8  # the near miss
    assert fingerprint(getattr(transformers, f"LlamaFor{head}")(config)).digest != base.digest


def test_fingerprint_of_the_same_model(base: Fingerprint) -> None:
    model = llama()
    before = (copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in named(model)})
    assert fingerprint(model) == base
    assert model.config.to_dict() == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in named(model))
    assert base.model_type == "llama"
    assert base.parameters == sum(p.numel() for p in model.parameters())


def named(model: Any) -> list[tuple[str, Any]]:
    return list(model.state_dict().items())


def test_dtype_does_not_count(base: Fingerprint) -> None:
    half = fingerprint(llama().to(torch.bfloat16))
    assert half.digest == base.digest
    assert half.weights != base.weights  # rounded: only information


def test_weights_are_only_information(base: Fingerprint) -> None:
    other = fingerprint(llama(seed=1))
    assert dataclasses.replace(other, weights=base.weights) == base
    assert other.weights != base.weights


def test_one_changed_matrix_shows_in_the_weights(base: Fingerprint) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert fingerprint(model).weights != base.weights


USE = {
    "transformers_version": "4.0.0",
    "transformers.js_config": {"dtype": "q4"},
    "use_cache": False,
    "eos_token_id": 5,
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "output_hidden_states": True,
    "attention_dropout": 0.5,
    "name_or_path": "somewhere/else",
    "initializer_range": 0.5,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "quantization_config": {"bits": 4},
    "new_option_of_a_later_version": None,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("option", USE)
def test_how_it_is_used_does_not_count(base: Fingerprint, option: str) -> None:
    model = llama()
    if option == "attn_implementation":
        model.set_attn_implementation("eager")
    else:
        setattr(model.config, option, USE[option])
    assert fingerprint(model).digest == base.digest


ARCHITECTURE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "intermediate_size": 72,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("option", ARCHITECTURE)
def test_architecture_counts(base: Fingerprint, option: str) -> None:
    assert fingerprint(llama(**{option: ARCHITECTURE[option]})).digest != base.digest


def test_tokens_may_be_added(base: Fingerprint) -> None:
    model = llama(vocab_size=160)
    assert fingerprint(model).digest == base.digest
    assert fingerprint(model).parameters == base.parameters + 2 * 32 * 32


def test_adapters_do_not_count(base: Fingerprint) -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "embed_tokens"]
    settings = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what peft calls
        adapted = peft.get_peft_model(llama(), settings)
    found = fingerprint(adapted.get_base_model())
    assert (found.digest, found.parameters) == (base.digest, base.parameters)
    with adapted.disable_adapter():  # what a saved cache was made with
        assert fingerprint(adapted.get_base_model()).weights != found.weights


def test_layers_of_other_libraries_count_by_their_widths(base: Fingerprint) -> None:
    """Whatever they hold: GPTQ's have integers in another shape, some have biases of their own."""

    class Packed(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.in_features, self.out_features = 32, width
            self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
            self.bias = torch.nn.Parameter(torch.zeros(width))

    model = llama()
    model.model.layers[0].mlp.up_proj = Packed(64)
    assert fingerprint(model).digest == base.digest
    model.model.layers[0].mlp.up_proj = Packed(72)
    assert fingerprint(model).digest != base.digest


def test_a_profile_of_a_version_that_covered_the_vocabulary() -> None:
    """Its digest was made of the whole configuration and all parameters' shapes."""
    earlier = dataclasses.replace(fingerprint(llama()), digest="88f03710941c3f87")
    own = profile(fingerprint=earlier)
    own.check(llama())
    for other in (llama(vocab_size=160), llama(num_hidden_layers=3)):
        with pytest.raises(ProfileError, match="this profile was measured on 88f03710941c3f87"):
            own.check(other)


def test_a_profile_of_a_version_that_covered_what_is_around_the_decoder() -> None:
    earlier = dataclasses.replace(fingerprint(llama()), digest="bae728afd1c39c13")
    own = profile(fingerprint=earlier)
    own.check(llama(vocab_size=160))
    with pytest.raises(ProfileError, match="this profile was measured on bae728afd1c39c13"):
        own.check(llama(num_hidden_layers=3))


def test_parameter_names_and_shapes_count(base: Fingerprint) -> None:
    model = llama()
    model.model.extra = torch.nn.Linear(2, 2)
    assert fingerprint(model).digest != base.digest


def test_a_saved_model_keeps_its_digest(base: Fingerprint, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert fingerprint(loaded).digest == base.digest


def test_a_model_without_storage_has_a_digest(base: Fingerprint) -> None:
    with torch.device("meta"):
        model = llama()
    assert fingerprint(model).digest == base.digest


def test_check_names_both_models(base: Fingerprint) -> None:
    other = llama(num_hidden_layers=3)
    own = profile(fingerprint=base)
    own.check(llama(seed=3).to(torch.float16))
    with pytest.raises(ProfileError) as caught:
        own.check(other)
    actual = fingerprint(other)
    assert str(caught.value) == (
        f"this profile was measured on {base.digest} (llama, {base.parameters:,} parameters), but "
        f"the model is {actual.digest} (llama, {actual.parameters:,} parameters); "
        "load the profile of this model, or calibrate it"
    )


# Imports ---------------------------------------------------------------------------------------


def test_plans_and_profiles_need_no_torch() -> None:
    modules = (
        adaskip_fx.plans.surrogates,
        adaskip_fx.plans.skip_plan,
        adaskip_fx.plans.tables,
        adaskip_fx.plans.validation,
        adaskip_fx.profiles.folder,
        adaskip_fx.profiles.profile,
        adaskip_fx.profiles.validation,
        adaskip_fx.policies,
        adaskip_fx.policies.adaskip,
    )
    for module in modules:
        tree = ast.walk(ast.parse(Path(cast(str, module.__file__)).read_text("utf-8")))
        imports = [n for n in tree if isinstance(n, ast.Import | ast.ImportFrom)]
        assert imports
        roots = {
            name.split(".")[0]
            for node in imports
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        }
        assert not roots & {"torch", "transformers"}


def test_a_plan_is_imported_without_torch() -> None:
    """Also by what its module imports, which takes seconds less than with torch."""
    source = "import sys, {}; print('torch' in sys.modules)"
    printed = [
        subprocess.run(
            [sys.executable, "-c", source.format(module)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout.strip()
        for module in ("adaskip_fx.plans.skip_plan", "adaskip_fx.plans.compose_surrogates")
    ]
    assert printed == ["False", "True"]
