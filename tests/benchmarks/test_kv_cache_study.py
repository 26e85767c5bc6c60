"""Simulated stores of keys and values, against eager models whose caches hold what is stored."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from adaskip_fx.evaluation.examples import Recall
from adaskip_fx.evaluation.task import FixedTask
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.testing import Oracle
from adaskip_fx.utils.transformers_internals import on_attention
from benchmarks.plots import plot
from benchmarks.studies import kv_cache
from benchmarks.studies.kv_reader import Reader, kept, observed
from benchmarks.studies.kv_storage import STORAGES, Storage
from benchmarks.studies.setup import Options, Subject, Text
from tests.support.compiled_llamas import VOCABULARY, entry

PROMPT, MORE = 40, 12
HEADS, GROUP, DIM = 2, 2, 8  # of the model: hidden 32, 4 heads
BY_NAME = {storage.name: storage for storage in STORAGES}


def ids_of(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator)


@pytest.fixture(scope="module")
def subject() -> Subject:
    texts = [Text(name, name, ids_of(400, seed)) for seed, name in enumerate(("one", "two"))]
    options = Options(alphas=(1.2,))
    bank = entry("three_layers")  # which other tests compile too
    return Subject("tiny", bank.model, bank.compiled, None, tuple(texts), options, 1, 80)


def windowed(subject: Subject, *full: int) -> SkipPlan:
    windows = Windows.of(["1.attention", "2.attention"], Window(9, 3, full))  # type: ignore[list-item]
    return SkipPlan.empty(subject.runtime.sublayers).with_windows(windows)


def read(subject: Subject, plan: SkipPlan, storage: Storage | None) -> torch.Tensor:
    ids = ids_of(PROMPT + MORE, 7)[None]
    with Reader(subject, plan).after(ids[:, :PROMPT]) as reader:
        reader.logits(ids[:, PROMPT:], BY_NAME["fp8"])  # which leaves nothing behind
        return reader.logits(ids[:, PROMPT:], storage)


# Storages ----------------------------------------------------------------------------------------


def fp8_values() -> np.ndarray[Any, Any]:
    """All finite numbers of e4m3: 4 bits of exponent with bias 7, 3 of mantissa; 448 at most."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    large = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    positive = np.array(small + large)
    return np.concatenate([-positive[::-1], positive])


@given(st.integers(0, 1000), st.sampled_from(["int8", "fp8", "int8, keys by channel"]))
def test_numbers_are_rounded_to_what_is_stored(seed: int, name: str) -> None:
    """Number by number, to the nearest of those that a scale allows."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, 1, 2, 40, 4)).astype(np.float32)
    found = BY_NAME[name].read(torch.tensor(keys), torch.tensor(values))
    allowed = fp8_values() if name == "fp8" else np.arange(-127.0, 128.0)
    for got, numbers, by_channel in zip(
        found, (keys, values), ("channel" in name, False), strict=True
    ):
        for (_, head, token, channel), number in np.ndenumerate(numbers):
            group = slice(32) if token < 32 else slice(32, 40)
            scaled = numbers[0, head, group, channel] if by_channel else numbers[0, head, token]
            grid = allowed * (np.abs(scaled).max() / allowed.max())
            nearest = np.abs(grid - number).min()
            stored = float(got[0, head, token, channel])
            assert abs(stored - number) <= nearest + 1e-5
            assert np.abs(grid - stored).min() < 1e-5


def test_bytes_of_a_head() -> None:
    """Of 10 tokens of 64 numbers; scales take 4 bytes."""
    assert BY_NAME["bfloat16"].head_bytes(10, 64) == 10 * 256
    assert BY_NAME["int8"].head_bytes(10, 64) == BY_NAME["fp8"].head_bytes(10, 64) == 10 * 136
    by_channel = BY_NAME["int8, keys by channel"]
    assert by_channel.head_bytes(10, 64) == by_channel.head_bytes(32, 64) - 22 * 132
    assert by_channel.head_bytes(33, 64) == 33 * 132 + 2 * 256


# Readers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [(), (1,)])
def test_windows_are_those_of_the_oracle(subject: Subject, full: tuple[int, ...]) -> None:
    plan, modules = windowed(subject, *full), subject.runtime.graphs.structure.modules
    heads = {str(s): w.by_head(HEADS) for s, w in plan.windows.prefill.items()}
    with torch.no_grad(), Oracle(subject.model, modules, prefill_windows=heads).watching():
        right = subject.model(input_ids=ids_of(PROMPT + MORE, 7)[None]).logits[0, PROMPT - 1 :]
    torch.testing.assert_close(read(subject, plan, None), right, rtol=1e-4, atol=1e-4)
    other = read(subject, windowed(subject, *({0, 1} - set(full))), None)
    assert (other - right).abs().max() > 0.1


def test_a_reader_leaves_out_what_a_plan_skips(subject: Subject) -> None:
    names, modules = ("1.attention",), subject.runtime.graphs.structure.modules
    with torch.no_grad(), Oracle(subject.model, modules, prefill={names[0]: None}).watching():
        right = subject.model(input_ids=ids_of(PROMPT + MORE, 7)[None]).logits[0, PROMPT - 1 :]
    found = read(subject, SkipPlan.of(subject.runtime.sublayers, names), None)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


class Stored(DynamicCache):
    """A cache that rounds what comes after a prompt before it is stored, and the prompt after."""

    storage: Storage | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any) -> Any:
        if self.storage is not None:
            key, value = self.storage.read(key, value)
        return super().update(key, value, layer, *args)

    def store(self, storage: Storage) -> None:
        for layer in self.layers:
            layer.keys, layer.values = storage.read(layer.keys, layer.values)
        self.storage = storage


@torch.no_grad()
def one_by_one(subject: Subject, cache: DynamicCache) -> torch.Tensor:
    """Logits [MORE, V] of tokens after a prompt that is in the cache, each in a step of its own."""
    rows = []
    for number, token in enumerate(ids_of(PROMPT + MORE, 7)[PROMPT:]):
        positions = torch.tensor([[PROMPT + number]])
        given = {"past_key_values": cache, "position_ids": positions}
        rows.append(subject.model(input_ids=token.view(1, 1), **given).logits[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["bfloat16", "int8", "fp8"])
@torch.no_grad()
def test_what_is_stored_is_what_later_tokens_read(subject: Subject, name: str) -> None:
    storage, empty = BY_NAME[name], SkipPlan.empty(subject.runtime.sublayers)
    cache = Stored()
    subject.model(input_ids=ids_of(PROMPT + MORE, 7)[None, :PROMPT], past_key_values=cache)
    cache.store(storage)
    right = one_by_one(subject, cache)
    found, exact = read(subject, empty, storage)[1:], read(subject, empty, None)[1:]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert (exact - right).abs().max() > 1e-3, "rounding is seen"


@contextmanager
def attentions(subject: Subject) -> Iterator[list[torch.Tensor]]:
    """What each token attends to, [H, T, T] of each layer, by transformers' eager attention."""
    ids = ids_of(PROMPT + MORE, 7)[None, :PROMPT]
    with torch.no_grad(), on_attention(subject.model, "eager"):
        output = subject.model(input_ids=ids, output_attentions=True)
    yield [layer[0] for layer in output.attentions]


def chosen(attention: torch.Tensor, count: int, pooled: int) -> np.ndarray[Any, Any]:
    """Which tokens of a prompt two heads keep, sorted, [2, count], in NumPy."""
    last = PROMPT // 8
    found = []
    for head in range(HEADS):
        mine = attention[head * GROUP : (head + 1) * GROUP, -last:, :-last].numpy().sum((0, 1))
        padded = np.pad(mine, pooled // 2)
        averages = [padded[i : i + pooled].mean() for i in range(len(mine))]
        best = np.argsort(averages)[::-1][: count - last]
        found.append(np.sort(np.concatenate([best, np.arange(PROMPT - last, PROMPT)])))
    return np.stack(found)


@pytest.mark.parametrize(("name", "pooled"), [("evicted", 5), ("evicted, wide", 13)])
@torch.no_grad()
def test_evicted_tokens_are_as_if_they_were_gone(subject: Subject, name: str, pooled: int) -> None:
    """The reference takes them out of the cache, as SnapKV does."""
    storage, empty = BY_NAME[name], SkipPlan.empty(subject.runtime.sublayers)
    cache, count = Stored(), PROMPT // 2
    subject.model(input_ids=ids_of(PROMPT + MORE, 7)[None, :PROMPT], past_key_values=cache)
    with attentions(subject) as layers:
        for layer, attention in zip(cache.layers, layers, strict=True):
            picked = torch.tensor(chosen(attention, count, pooled))[None, :, :, None]
            picked = picked.expand(-1, -1, -1, DIM)
            layer.keys, layer.values = (x.gather(2, picked) for x in (layer.keys, layer.values))
    cache.store(storage)
    right = one_by_one(subject, cache)
    found = read(subject, empty, storage)[1:]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert (read(subject, empty, BY_NAME["bfloat16"])[1:] - right).abs().max() > 0.1


def test_heads_with_windows_evict_nothing(subject: Subject) -> None:
    plan, evicted = windowed(subject), BY_NAME["evicted"]
    windows = {**plan.windows.decode, subject.runtime.sublayers[0]: Window(9, 3)}
    everywhere = plan.with_windows(Windows.of(windows))
    same = read(subject, everywhere, evicted) - read(subject, everywhere, BY_NAME["bfloat16"])
    assert same.abs().max() < 1e-4
    assert (read(subject, plan, evicted) - read(subject, plan, None)).abs().max() > 0.01


def test_scores_and_what_is_kept_by_hand() -> None:
    query, key = torch.zeros(1, 2, 16, 4), torch.zeros(1, 1, 16, 4)
    key[..., 5, 0] = query[..., 0] = 50.0  # all attend to token 5, whose neighbours share in it
    scores = observed(query, key, None)
    torch.testing.assert_close(scores[0, 5], torch.tensor(2 * 2.0))  # 2 heads, 2 tokens
    assert scores[0, :5].max() < 1e-6
    assert kept(scores, 16, 7, 5)[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 14, 15]
    assert kept(scores, 16, 1, 5)[0].nonzero().flatten().tolist() == [15]


def test_other_attention_is_refused(subject: Subject) -> None:
    reader, x = Reader(subject, SkipPlan.empty(subject.runtime.sublayers)), torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match="attention with softcap is not simulated; take another"):
        reader._attend(subject.model.model.layers[0].self_attn, x, x, x, softcap=30.0)


# The study ---------------------------------------------------------------------------------------


BY_CHANNEL = ("int8, keys by channel", "evicted, wide, int8")


def answers() -> FixedTask:
    made = [Recall(tuple(ids_of(30, n).tolist()), tuple(ids_of(3, n).tolist())) for n in range(4)]
    return FixedTask("recall", "accuracy", made)


def seen_bytes(subject: Subject, plan: SkipPlan, storage: str) -> int:
    """Bytes that a step reads with 80 tokens stored, token by token."""
    size, scale = (1, 4) if storage.endswith(("int8", "fp8", "channel")) else (2, 0)
    total = 0
    for sublayer in subject.runtime.sublayers:
        if sublayer.kind != "attention" or sublayer in plan.decode:
            continue
        for head in range(HEADS):
            window = plan.windows.decode.get(sublayer)
            full = window is None or head in window.full_heads
            stored = range(40) if full and "evicted" in storage else range(80)
            for number, _ in enumerate(
                j for j in stored if full or window is None or sees(window, j)
            ):
                total += 2 * DIM * size + scale
                total += (4 * DIM if number % 32 == 0 else 0) if storage in BY_CHANNEL else scale
    return total


def sees(window: Window, j: int) -> bool:
    """Whether the last of 80 tokens sees the one at j."""
    return 79 - j < window.tokens or j < window.sinks


def broken(subject: Subject, result: dict[str, Any]) -> set[str]:
    found = set()
    rows = {(row["attention"], row["storage"]): row for row in result["rows"]}
    attention = list(dict.fromkeys(name for name, _ in rows))
    plans = {p["name"]: p for p in result["plans"]}
    if [*rows] != [(a, s) for a in attention for s in BY_NAME] or [*plans] != attention:
        found.add("rows")
    most = rows["full", "bfloat16"]["bytes"]
    for (name, storage), row in rows.items():
        plan = SkipPlan.empty(subject.runtime.sublayers)
        skipped, windows = plans[name]["decode"], plans[name].get("windows", {}).get("decode", {})
        if skipped:
            plan = SkipPlan.of(plan.sublayers, skipped)
        plan = plan.with_windows(Windows.of({s: Window(**w) for s, w in windows.items()}))
        if row["bytes"] != seen_bytes(subject, plan, storage):
            found.add("bytes")
        if abs(row["share"] * most - row["bytes"]) > 1e-6:
            found.add("share")
        together = name != "full" and storage != "bfloat16"
        if together != ("kl_sum" in row) or together != ("share_product" in row):
            found.add("parts")
        elif together:
            parts = rows[name, "bfloat16"], rows["full", storage]
            kl, share = parts[0]["kl"] + parts[1]["kl"], parts[0]["share"] * parts[1]["share"]
            if abs(row["kl_sum"] - kl) > 1e-12 or abs(row["share_product"] - share) > 1e-12:
                found.add("parts")
    return found


@pytest.fixture(scope="module")
def measured(subject: Subject) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kv_cache, "_tasks", lambda _: [answers()])
        return kv_cache.kv_cache(subject, (0.3, 0.6))


@pytest.mark.slow
def test_the_study(subject: Subject, measured: dict[str, Any], tmp_path: Path) -> None:
    assert broken(subject, measured) == set()
    named = ["full", "windows 30%", "windows 60%", "1 attention skipped"]
    assert [plan["name"] for plan in measured["plans"]] == named
    rows = {(row["attention"], row["storage"]): row for row in measured["rows"]}
    for share in (0.3, 0.6):
        assert rows[f"windows {share:.0%}", "bfloat16"]["share"] <= 1 - share
    assert rows["full", "bfloat16"]["kl"] < rows["full", "int8"]["kl"] < rows["full", "fp8"]["kl"]
    assert set(measured["full"]["perplexity"]) == {"two"}, "windows were chosen on the other"
    task = answers()
    with torch.no_grad():
        said = [
            subject.model(torch.tensor([[*e.prompt, *e.answer]])).logits[0, 29:32].argmax(-1)
            for e in task.examples(None)
            if isinstance(e, Recall)
        ]
    right = [tuple(s.tolist()) == e.answer for s, e in zip(said, task.examples(None), strict=True)]  # type: ignore[union-attr]
    assert measured["full"]["tasks"] == {"recall": sum(right) / 4}
    lines = kv_cache.summary(measured).splitlines()
    assert len(lines) == 3 + 4 * len(STORAGES)
    assert lines[0].startswith("windows of 4+5 at 80 tokens, chosen on one; the full model finds")
    (tmp_path / "r.json").write_text(json.dumps(measured, allow_nan=False))
    assert plot("matrix", [tmp_path / "r.json"], tmp_path, "r")


def test_near_misses(subject: Subject, measured: dict[str, Any]) -> None:
    for key, step in (("bytes", 1), ("kl_sum", 1e-6), ("share_product", 1e-6)):
        wrong = copy.deepcopy(measured)
        wrong["rows"][-1][key] += step
        assert broken(subject, wrong), key
    wrong = copy.deepcopy(measured)
    wrong["rows"].pop()
    assert "rows" in broken(subject, wrong)


def test_plans_that_are_given(subject: Subject, tmp_path: Path) -> None:
    windowed(subject, 0).save(tmp_path / "plan.json")
    options = Options(plans=(("mine", tmp_path / "plan.json"),))
    other = dataclasses.replace(subject, options=options)
    plans = kv_cache._plans(other, Window(5), (0.4,))
    assert [*plans] == ["full", "mine 28%", "1 attention skipped"]
    assert plans["mine 28%"] == windowed(subject, 0)
