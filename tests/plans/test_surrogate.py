"""Surrogates and compensations: what they hold, what they refuse, and their files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogate import SHAPES, Surrogate, SurrogateKind
from adaskip_fx.plans.surrogates import Surrogates
from tests.support.surrogates import surrogate

KINDS: tuple[SurrogateKind, ...] = tuple(SHAPES)
ATTENTION, FFN = Sublayer(0, "attention"), Sublayer(0, "ffn")


@pytest.mark.parametrize("kind", KINDS)
def test_a_surrogate_is_a_value(kind: SurrogateKind) -> None:
    one, same, other = surrogate(kind), surrogate(kind), surrogate(kind, seed=1)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    for tensor in one.tensors.values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0


def test_what_it_says_of_itself() -> None:
    words = ["diagonal", "rank 3", "linear", "normalized"]
    assert [str(surrogate(k, rank=3)) for k in KINDS[1:]] == words
    assert str(Surrogate.scale(0.93149)) == "\N{MULTIPLICATION SIGN}0.931"
    assert [surrogate(k).factor is None for k in KINDS] == [False, True, True, True, True]
    assert [surrogate(k, rank=3).rank for k in KINDS] == [0, 0, 3, 0, 0]
    assert [surrogate(k, hidden=6).width for k in KINDS] == [None, 6, 6, 6, 6]
    assert [surrogate(k, hidden=4, rank=2).parameters for k in KINDS] == [1, 4, 20, 20, 20]


BAD: list[tuple[SurrogateKind, dict[str, Any], str]] = [
    (
        cast(SurrogateKind, "cubic"),
        {},
        "unknown surrogate 'cubic': this version has scale, diagonal",
    ),
    ("scale", {}, "a scale surrogate has tensors factor, got none"),
    ("linear", {"weight": np.eye(2)}, "a linear surrogate has tensors weight, bias, got weight"),
    ("linear", {"weight": np.ones((2, 3)), "bias": np.ones(2)}, r"shape \[2, 3\], expected \[H, H"),
    ("linear", {"weight": np.eye(2), "bias": np.ones(3)}, r"bias of a linear .* with H = 2"),
    ("low_rank", {"down": np.ones((1, 3)), "up": np.ones((3, 2)), "bias": np.ones(3)}, "up of a l"),
    ("diagonal", {"factor": np.ones((2, 2))}, r"shape \[2, 2\], expected \[H\]"),
    (
        "diagonal",
        {"factor": np.array([1, np.nan])},
        "factor of a diagonal surrogate must be finite",
    ),
    ("scale", {"factor": np.float64(-1)}, r"must be positive, got -1\.0"),
]


@pytest.mark.parametrize(("kind", "tensors", "message"), BAD)
def test_bad_surrogates_are_refused(
    kind: SurrogateKind, tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Surrogate(kind, tensors)


def mixed() -> Surrogates:
    return Surrogates({ATTENTION: surrogate("linear"), FFN: Surrogate.scale(0.9)})


def test_merged_prefers_the_other() -> None:
    more = mixed().merged(Surrogates.scale({ATTENTION: 0.5}))
    assert more.factors == {ATTENTION: 0.5, FFN: 0.9}
    assert mixed().factors == {FFN: 0.9}
    assert mixed().factor(ATTENTION) is None
    assert mixed().parameters == 21


@given(st.dictionaries(st.sampled_from([ATTENTION, FFN]), st.sampled_from(KINDS)))
def test_a_compensation_survives_its_file(kinds: dict[Sublayer, SurrogateKind]) -> None:
    import tempfile

    one = Surrogates({s: surrogate(kind, seed=i) for i, (s, kind) in enumerate(kinds.items())})
    with tempfile.TemporaryDirectory() as folder:
        one.save(Path(folder) / "c.safetensors")
        assert Surrogates.load(Path(folder) / "c.safetensors") == one


def damaged(path: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> None:
    """Write the file of `mixed()` with other tensors or another header."""
    mixed().save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, about)
    path.write_bytes(safetensors.numpy.save(tensors, metadata=about))


CHANGES: list[tuple[Callable[[dict[str, Any], dict[str, str]], Any], str]] = [
    (lambda t, a: a.update(format="other"), "not surrogates that this version reads"),
    (lambda t, a: a.update({"0.ffn": "cubic"}), "unknown surrogate 'cubic' of 0.ffn"),
    (lambda t, a: a.update({"0.mlp": "scale"}), "'0.mlp' is not a sublayer"),
    (lambda t, a: t.pop("0.attention/bias"), "not valid surrogates"),
    (lambda t, a: t["0.attention/bias"].fill(7), "edited after it was saved"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_damaged_files_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], Any], message: str
) -> None:
    path = tmp_path / "c.safetensors"
    damaged(path, lambda t, a: None)
    assert Surrogates.load(path) == mixed()  # near miss: written again, unchanged
    damaged(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        Surrogates.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"{}")
    for name in ("c", "missing"):
        with pytest.raises(ValueError, match="cannot be read"):
            Surrogates.load(tmp_path / name)


def plan() -> SkipPlan:
    sublayers = [Sublayer(i, kind) for i in range(2) for kind in ("attention", "ffn")]
    return SkipPlan.of(sublayers, ["0.attention", "0.ffn"], surrogates=mixed())


def test_a_plan_keeps_its_tensors_beside_it(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0].startswith("compensation-")
    loaded = SkipPlan.load(tmp_path / "plan.json")
    assert loaded == plan()
    assert loaded.surrogates == mixed()


def test_a_plan_without_its_tensors_is_refused(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    file = next(tmp_path.glob("compensation-*"))
    content = file.read_bytes()
    Surrogates({ATTENTION: surrogate("linear", seed=3)}).save(file)
    with pytest.raises(PlanError, match=r"the tensors of 0\.attention's surrogate are not in its"):
        SkipPlan.load(tmp_path / "plan.json")
    file.unlink()
    with pytest.raises(PlanError, match="is missing: copy it along with the plan"):
        SkipPlan.load(tmp_path / "plan.json")
    file.write_bytes(content)
    assert SkipPlan.load(tmp_path / "plan.json") == plan()


def test_other_tensors_are_another_plan() -> None:
    other = plan().with_surrogates(
        mixed().merged(Surrogates({ATTENTION: surrogate("linear", seed=3)}))
    )
    assert other.digest != plan().digest
    for phase in ("prefill", "decode"):
        assert other.phase_digest(phase) != plan().phase_digest(phase)
    assert "skip linear" in str(plan())
