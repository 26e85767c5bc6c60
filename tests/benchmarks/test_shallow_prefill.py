"""Prompts that upper layers do not read in full, against eager models; promises by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from adaskip_fx.evaluation.examples import Recall
from adaskip_fx.evaluation.task import FixedTask
from adaskip_fx.testing import Oracle
from benchmarks import models
from benchmarks.plots import plot
from benchmarks.studies import shallow_prefill
from benchmarks.studies.quality import continued
from benchmarks.studies.setup import Options, Subject, Text
from benchmarks.studies.shallow_prefill import WAYS, plan_of, promised
from tests.support.compiled_llamas import VOCABULARY, entry

LENGTH = 80  # so that windows have 5 tokens
PROMPT, MORE = 30, 8


def ids_of(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator)


@pytest.fixture(scope="module")
def subject() -> Subject:
    texts = [Text("one", "one", ids_of(400, 0))]
    bank = entry("three_layers")  # which other tests compile too
    return Subject("tiny", bank.model, bank.compiled, None, tuple(texts), Options(), 1, LENGTH)


@torch.no_grad()
def shallow(
    subject: Subject, way: str, first: int, prompt: torch.Tensor, more: torch.Tensor
) -> torch.Tensor:
    """Logits [1 + n, V] of the last token of a prompt, and of more, each in a step of its own."""
    model, modules = subject.model, subject.runtime.graphs.structure.modules
    upper = [name for name in modules if int(name.split(".")[0]) >= first]
    attention = [name for name in upper if name.endswith("attention")]
    windows = dict.fromkeys(attention, [(4, 5)] * 2) if "window" in way else {}
    skipped = [] if windows else upper if "POP" in way else attention
    oracle = Oracle(
        model,
        modules,
        prefill=dict.fromkeys(skipped),
        prefill_windows=windows,
        decode_windows=windows if "decoding" in way else {},
    )
    cache = DynamicCache()
    pieces = [prompt[:, :-1], *torch.split(torch.cat((prompt[:, -1:], more), 1), 1, 1)]
    with oracle.watching():
        rows = [model(input_ids=ids, past_key_values=cache).logits[0, -1] for ids in pieces]
    return torch.stack(rows[1:])


@pytest.mark.parametrize("way", WAYS)
def test_what_follows_is_decoded_in_full(subject: Subject, way: str) -> None:
    ids, runtime = ids_of(PROMPT + MORE, 7)[None], subject.runtime
    prompt, more = ids[:, :PROMPT], ids[:, PROMPT:]
    right = shallow(subject, way, 1, prompt, more)
    found = continued(runtime, plan_of(way, runtime.sublayers, 1, LENGTH), prompt, more)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    other = continued(runtime, plan_of(way, runtime.sublayers, 2, LENGTH), prompt, more)
    assert (other - right).abs().max() > 0.01
    last = continued(runtime, plan_of(way, runtime.sublayers, 1, LENGTH), prompt, more[:, :0])
    torch.testing.assert_close(last, right[:1], rtol=1e-4, atol=1e-4)


# Promises ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> Any:
    return models.shape_8b()


def operations(way: str, first: int, tokens: int, window: int) -> float:
    """What a prompt of an 8B Llama takes: 32 layers of 4,096, 8 of 32 heads with K/V."""
    projections = {"q": 4096**2, "k": 4096 * 1024, "v": 4096 * 1024, "o": 4096**2}
    ffn, attention = 3 * 4096 * 14336, sum(projections.values())
    seen = 4 + window
    all_pairs = tokens**2 / 2
    pairs = seen**2 / 2 + (tokens - seen) * seen
    total = 2 * 128256 * 4096
    for layer in range(32):
        weights, seen_pairs = attention + ffn, all_pairs
        if layer >= first and "window" in way:
            seen_pairs = pairs
        elif layer >= first:
            weights, seen_pairs = projections["k"] + projections["v"], 0
            weights += 0 if "POP" in way else ffn
        total += int(2 * weights * tokens + 4 * 4096 * seen_pairs)
    return total


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [4096, 32768])
def test_promises_by_hand(large: Any, way: str, tokens: int) -> None:
    right = 1 - operations(way, 16, tokens, tokens // 16) / operations(way, 32, tokens, 0)
    assert promised(large, way, 0.5, tokens) == pytest.approx(right, rel=1e-9)
    assert promised(large, way, 0.25, tokens) > 1.2 * right, "companion"


# The study ---------------------------------------------------------------------------------------


def answers() -> FixedTask:
    made = [Recall(tuple(ids_of(30, n).tolist()), tuple(ids_of(3, n).tolist())) for n in range(3)]
    return FixedTask("recall", "accuracy", made)


@pytest.fixture(scope="module")
def measured(subject: Subject) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shallow_prefill, "_tasks", lambda _: [answers()])
        return shallow_prefill.shallow_prefill(subject, (0.34, 0.67, 1.0))


def ratio(subject: Subject, way: str, first: int) -> float:
    """Perplexity of second halves after shallow prompts, against that of the full model."""
    lost, tokens = 0.0, 0
    for ids in subject.windows(subject.texts[0], "second"):
        half = LENGTH // 2
        parts = ids[:, :half], ids[:, half:-1]
        for sign, layer in ((1, first), (-1, 99)):
            logits = shallow(subject, way, layer, *parts)[1:]
            lost += sign * float(cross_entropy(logits, ids[0, half + 1 :], reduction="sum"))
        tokens += half - 1
    return math.exp(lost / tokens)


@pytest.mark.slow
def test_the_study(subject: Subject, measured: dict[str, Any], tmp_path: Path) -> None:
    rows = {(row["way"], row["from_layer"]): row for row in measured["rows"]}
    assert [*rows] == [(way, first) for way in WAYS for first in (1, 2)]
    for way in ("window", "K/V alone (POP)"):
        assert rows[way, 1]["perplexity_ratio"] == pytest.approx(ratio(subject, way, 1), rel=1e-4)
    assert rows["window", 1]["perplexity_ratio"] != pytest.approx(1, rel=1e-3)
    # The last layer has read its keys and values from below, and hands on nothing else.
    assert rows["window", 2]["perplexity_ratio"] == pytest.approx(1, rel=1e-5)
    assert rows["window, decoding too", 2]["perplexity_ratio"] != pytest.approx(1, rel=1e-3)
    right = 0
    for example in answers().examples(None):
        assert isinstance(example, Recall)
        whole = torch.tensor([[*example.prompt, *example.answer]])
        with torch.no_grad():
            said = subject.model(whole).logits[0, 29:32].argmax(-1)
        right += tuple(said.tolist()) == example.answer
    assert measured["full"]["tasks"] == {"recall": right / 3}
    (panel,) = measured["panels"]
    assert panel["columns"] == [1, 2]
    assert panel["values"][0] == pytest.approx([math.log10(rows["window", 1]["kl"]), -7])
    lines = shallow_prefill.summary(measured).splitlines()
    assert len(lines) == 3 + len(rows)
    assert lines[0].startswith("40 tokens decoded after prompts of as many, 3 layers; the full")
    (tmp_path / "r.json").write_text(json.dumps(measured))
    assert plot("matrix", [tmp_path / "r.json"], tmp_path, "r")
