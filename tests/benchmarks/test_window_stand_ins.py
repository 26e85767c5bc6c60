"""Stand-ins of windows: maps against NumPy, windows against eager masks, and the study on a toy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaskip_fx.evaluation.examples import Recall
from adaskip_fx.evaluation.task import FixedTask
from adaskip_fx.fitting.weighted_sample import Sample
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.testing import Oracle
from benchmarks.plots import plot
from benchmarks.studies import stand_in_judge, window_stand_ins
from benchmarks.studies.setup import Options, Subject, Text
from benchmarks.studies.stand_in_judge import recalled
from benchmarks.studies.stand_in_training import refine
from benchmarks.studies.stand_ins import Kind, fitted
from benchmarks.studies.windowed_model import WindowedModel
from tests.support.compiled_llamas import VOCABULARY, entry
from tests.support.recipe_tokenizers import Letters

LENGTH = 40
HEADS = 2  # of keys and values


def ids_of(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator)


@pytest.fixture(scope="module")
def subject() -> Subject:
    texts = [Text(name, name, ids_of(400, seed)) for seed, name in enumerate(("one", "two"))]
    options = Options(calibrate=("one",), steps=(4,))
    bank = entry("three_layers")  # which other tests compile too
    return Subject("tiny", bank.model, bank.compiled, Letters(), tuple(texts), options, 1, LENGTH)


def windowed(subject: Subject, *full: int, layers: tuple[int, ...] = (1, 2)) -> SkipPlan:
    windows = {f"{layer}.attention": Window(7, 2, full) for layer in layers}
    return SkipPlan.empty(subject.runtime.sublayers).with_windows(Windows.of(windows))  # type: ignore[arg-type]


@torch.no_grad()
def seen_through(subject: Subject, plan: SkipPlan, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of the eager model with a mask of every pair and head."""
    heads = {str(s): w.by_head(HEADS) for s, w in plan.windows.prefill.items()}
    modules = subject.runtime.graphs.structure.modules
    with Oracle(subject.model, modules, prefill_windows=heads).watching():
        logits: torch.Tensor = subject.model(input_ids=ids).logits
    return logits


# Maps ---------------------------------------------------------------------------------------------


def best_of_rank(x: np.ndarray[Any, Any], t: np.ndarray[Any, Any], rank: int) -> float:
    """The least squared error of a constant and a map of a rank: by singular values."""
    x, t = x - x.mean(0), t - t.mean(0)
    found = x @ np.linalg.lstsq(x, t, rcond=None)[0]
    left, values, right = np.linalg.svd(found, full_matrices=False)
    return float(((t - (left[:, :rank] * values[:rank]) @ right[:rank]) ** 2).sum())


@pytest.mark.parametrize("rank", [0, 2, 9])
def test_maps_are_the_best_of_their_rank(rank: int) -> None:
    """9 is more than the outputs: the plain regression."""
    rng = np.random.default_rng(rank)
    x = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12)
    t = x @ rng.normal(size=(12, 6)) + rng.normal(size=(300, 6)) + 5
    parts = zip(torch.tensor(x).split(120), torch.tensor(t).split(120), strict=True)
    map_ = fitted(parts, Kind(rank), ridge=0.0)
    error = float((torch.tensor(t) - map_(torch.tensor(x))).square().sum())
    assert error == pytest.approx(best_of_rank(x, t, rank), rel=1e-4)
    assert map_.down.shape == (min(rank, 6), 12)


def test_a_linear_loss_is_restored_by_the_rank_that_it_has() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    lost = x @ torch.randn(12, 3, generator=generator) @ torch.randn(3, 8, generator=generator) - 2
    restored = [fitted([(x, lost)], Kind(rank), ridge=1e-9)(x) for rank in (3, 2)]
    torch.testing.assert_close(restored[0], lost, rtol=1e-4, atol=1e-4)
    assert (restored[1] - lost).abs().max() > 0.1, "companion: a rank too few"


def test_names_of_kinds() -> None:
    for name in ("constant", "input 8", "output 64 refined", "constant refined"):
        assert str(Kind.parse(name)) == name
    for name in ("input", "input 0", "stream 8", "output 8 more", "refined", ""):
        with pytest.raises(ValueError, match=f"no stand-in is named '{name}': write 'constant'"):
            Kind.parse(name)


# Models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [(), (1,)])
def test_windows_are_those_of_the_oracle(subject: Subject, full: tuple[int, ...]) -> None:
    ids = torch.stack([ids_of(LENGTH, seed) for seed in (5, 6)])
    plan = windowed(subject, *full)
    with torch.no_grad(), WindowedModel(subject, plan).running() as model:
        found, everything = model.logits(ids), model.logits(ids, full=True)
    right = seen_through(subject, plan, ids)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    empty = seen_through(subject, SkipPlan.empty(subject.runtime.sublayers), ids)
    torch.testing.assert_close(everything, empty, rtol=1e-4, atol=1e-4)
    assert (found - empty).abs().max() > 0.1


@pytest.mark.parametrize("reads", ["input", "output"])
@torch.no_grad()
def test_enough_rank_restores_what_windows_lost(subject: Subject, reads: str) -> None:
    """31 tokens are hidden something from, and maps have 32 inputs: all of it can be explained."""
    ids, plan = ids_of(LENGTH, 5)[None], windowed(subject, 0)
    right = seen_through(subject, SkipPlan.empty(subject.runtime.sublayers), ids)
    errors = {}
    with WindowedModel(subject, plan).running() as model:
        for rank in (32, 1):
            model.fit(ids, Kind(rank, reads), ridge=1e-9)  # type: ignore[arg-type]
            errors[rank] = float((model.logits(ids) - right).abs().max())
            explained = [*model.explained.values()]
            assert (min(explained) > 0.9999) == (rank == 32)
    assert errors[32] < 0.02 < 0.1 < errors[1]
    again = subject.model(input_ids=ids).logits
    torch.testing.assert_close(again, right, rtol=1e-4, atol=1e-4)  # nothing is left behind


def test_other_attention_is_refused(subject: Subject) -> None:
    model, x = WindowedModel(subject, windowed(subject)), torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="attention with softcap is not simulated; take another"):
        model._attend(subject.model.model.layers[0].self_attn, x, x, x, softcap=30.0)


def test_refinement_comes_nearer_to_the_full_model(subject: Subject) -> None:
    kinds = [[Sample(ids_of(LENGTH, 10 * kind + n)[None]) for n in range(3)] for kind in (1, 2)]
    with WindowedModel(subject, windowed(subject)).running() as model:
        model.fit(kinds[0][0].ids, Kind(4))
        begun = model.stand_ins
        losses = refine(model, kinds, 8)
        moved = {s: (model.stand_ins[s].up - one.up).abs().max() for s, one in begun.items()}
        assert [*losses] == [0, 2, 4, 6, 8]
        assert min(losses.values()) < losses[0]
        assert min(moved.values()) > 0
        assert not any(one.up.requires_grad for one in model.stand_ins.values())
        with pytest.raises(ValueError, match="needs two samples of each kind: give more --samples"):
            refine(model, [kinds[0][:1]], 8)


@torch.no_grad()
def test_questions_are_answered_in_one_batch_as_alone(subject: Subject) -> None:
    prompts = [(*ids_of(20 + 3 * n, n).tolist(),) for n in range(4)]
    said = [subject.model(torch.tensor([p])).logits[0, -1].argmax().item() for p in prompts]
    asked = [
        Recall(p, (s if n % 2 else (s + 1) % VOCABULARY,))  # type: ignore[arg-type]
        for n, (p, s) in enumerate(zip(prompts, said, strict=True))
    ]
    asked.append(Recall(prompts[0], (said[0], *ids_of(6, 9).tolist())))
    with WindowedModel(subject, SkipPlan.empty(subject.runtime.sublayers)).running() as model:
        assert recalled(model, asked, subject.device) == [False, True, False, True, False]


# The study ----------------------------------------------------------------------------------------


def answers() -> FixedTask:
    made = [Recall(tuple(ids_of(30, n).tolist()), tuple(ids_of(2, n).tolist())) for n in range(3)]
    return FixedTask("passkey", "accuracy", made)


def run(subject: Subject, monkeypatch: pytest.MonkeyPatch, **more: Any) -> dict[str, Any]:
    monkeypatch.setattr(stand_in_judge, "tasks", lambda _: [answers()])
    monkeypatch.setattr(
        window_stand_ins,
        "retrieval_samples",
        lambda _, ids, *__, **___: [Sample(one) for one in ids],
    )
    options = dataclasses.replace(subject.options, **more)
    return window_stand_ins.window_stand_ins(dataclasses.replace(subject, options=options))


def test_the_study(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = list[dict[str, Any]]()
    for name, plan in (("a", windowed(subject)), ("b", windowed(subject, 1, layers=(2,)))):
        plan.save(tmp_path / f"{name}.json")
    files = {name: ("layers", tmp_path / f"{name}.json") for name in "ab"}
    given = {"plans": (files["a"],), "surrogates": ("nothing", "input 4 refined")}
    first = run(
        subject, monkeypatch, save=lambda r: saved.append(json.loads(json.dumps(r))), **given
    )
    assert [len(r["rows"]) for r in saved] == [1, 2]
    assert first["fitted_on"] == {"texts": 4, "questions": 4}
    assert set(first["full"]["texts"]) == {"two"}
    alone, refined = first["rows"]
    (ids,) = subject.windows(subject.texts[1], "second")
    (other,) = subject.windows(subject.texts[1], "first")
    kl = 0.0
    for one in (ids, other):
        logits = [
            seen_through(subject, p, one)[0, :-1].log_softmax(-1)
            for p in (SkipPlan.empty(subject.runtime.sublayers), windowed(subject))
        ]
        kl += float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()) / 2
    assert alone["texts"]["two"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert alone["texts"]["two"]["kl_each"][0] != alone["texts"]["two"]["kl_each"][1]
    assert refined["explained"].keys() == {"1.attention", "2.attention"}
    assert [*refined["kl_by_step"]] == [0, 1, 2, 3, 4]

    given = {"plans": (files["b"],), "surrogates": ("nothing",)}
    merged = run(subject, monkeypatch, earlier=lambda: saved[-1], **given)
    assert [(row["plan"], row["stand_in"]) for row in merged["rows"]] == [
        ("layers", "nothing"),
        ("layers", "nothing"),
        ("layers", "input 4 refined"),
    ]
    assert merged["rows"][1:] == saved[-1]["rows"]
    other_seed = {**saved[-1], "seed": 1}
    assert len(run(subject, monkeypatch, earlier=lambda: other_seed, **given)["rows"]) == 1
    lines = window_stand_ins.summary(merged).splitlines()
    assert len(lines) == 3 + 3
    (tmp_path / "r.json").write_text(json.dumps(merged))
    assert plot("shares", [tmp_path / "r.json"], tmp_path, "r")
