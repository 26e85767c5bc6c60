"""What `print(fast.adaskip)` says, in every state of a request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaskip_fx
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.tables import by_kind, storage
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.runtime.report import runtime_report
from adaskip_fx.runtime.runtime import Runtime

LAYERS, KV_HEADS, HEAD_DIM = 3, 1, 8
SUBLAYERS = tuple(
    adaskip_fx.Sublayer(layer, kind) for layer in range(LAYERS) for kind in ("attention", "ffn")
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def profile(model: Any) -> adaskip_fx.Profile:
    """The attention of layers 0 and 2 changes the stream least, then ffn 1."""
    similarity = np.array([0.9, 0.1, 0.2, 0.5, 0.8, 0.3])
    moments = np.ones((1, len(SUBLAYERS), 5))
    moments[0, :, 0] = similarity
    return adaskip_fx.Profile(SUBLAYERS, moments, fingerprint(model), {}, {})


@pytest.fixture(scope="module")
def compiled(model: Any, profile: adaskip_fx.Profile) -> Any:
    return adaskip_fx.compile(
        model, profile, alpha=1.5, policy=adaskip_fx.AdaSkip(window=4), backend="eager"
    )


@pytest.fixture
def runtime(compiled: Any) -> Iterator[Runtime]:
    yield runtime_of(compiled)
    assert not runtime_of(compiled).live_caches()


def lines(runtime: Runtime) -> dict[str, str]:
    """The report's text by title."""
    rows = [re.split(r"  +", line.strip(), maxsplit=1) for line in str(runtime).splitlines()]
    return {title: text for title, text in rows}


def decode(compiled: Any, steps: int, rows: int = 1) -> Any:
    """A request with ten tokens of prompt and some decoded ones; returns its cache."""
    with torch.no_grad():
        cache = compiled(torch.ones(rows, 10, dtype=torch.int64)).past_key_values
        for _ in range(steps):
            compiled(torch.ones(rows, 1, dtype=torch.int64), past_key_values=cache)
    return cache


def test_the_plan_and_no_request(runtime: Runtime) -> None:
    said = lines(runtime)
    assert said["model"] == "LlamaForCausalLM, float32 on cpu"
    assert said["prefill"] == f"plan {runtime.plan.digest[:8]}, skips 2 of 6 sublayers"
    assert said["skipped"] == "attention 0 2"
    assert said["online"] == "the first 4 decoded tokens of a request are measured"
    assert said["requests"] == "0 live"
    assert "1" not in said


def test_titles_and_texts_are_aligned(runtime: Runtime) -> None:
    columns = {re.match(r" *\S+(?: \S+)* +", row).end() for row in str(runtime).splitlines()}  # type: ignore[union-attr]
    assert len(columns) == 1
    assert runtime_report(runtime) == str(runtime)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, "10 tokens stored, window not open yet"),
        (1, "11 tokens stored, window 1 of 4"),
        (3, "13 tokens stored, window 3 of 4"),
        (4, "14 tokens stored, window closed after 4"),
        (6, "16 tokens stored, window closed after 4"),
    ],
)
def test_the_window_of_a_live_request(
    compiled: Any, runtime: Runtime, steps: int, expected: str
) -> None:
    cache = decode(compiled, steps)
    assert lines(runtime)["1"] == expected
    del cache


def test_the_plan_that_a_request_has_learned(compiled: Any, runtime: Runtime) -> None:
    cache = decode(compiled, 2)
    before = f"plan {runtime.plan.digest[:8]}, skips 2 of 6 sublayers, as prefill does"
    assert lines(runtime)["decode"] == before
    learned = runtime.plan.with_decode_extra([SUBLAYERS[1], SUBLAYERS[5]])
    cache.request.decode.plan = learned
    assert lines(runtime)["decode"] == (
        f"plan {learned.digest[:8]}, skips 4 of 6 sublayers, on top of prefill's: ffn 0 2"
    )
    assert lines(runtime)["prefill"].startswith(f"plan {runtime.plan.digest[:8]}")
    del cache


def test_storage_against_a_full_cache(compiled: Any, runtime: Runtime) -> None:
    assert lines(runtime)["K/V"].startswith("0.0 KiB in live requests")
    caches = [decode(compiled, 1), decode(compiled, 0)]
    layer = 2 * KV_HEADS * caches[0].capacity * HEAD_DIM * 4  # K and V, float32
    assert runtime.cache_bytes == 2 * layer  # two requests, one of three attentions each
    assert lines(runtime)["K/V"] == (
        f"{storage(2 * layer)} in live requests (1 of 3 layers); "
        f"{storage(6 * layer)} with all layers"
    )
    assert lines(runtime)["requests"] == "2 live"
    assert lines(runtime)["1"].startswith("11 tokens")  # the longest first
    assert lines(runtime)["2"].startswith("10 tokens")


def test_batches_are_named(compiled: Any, runtime: Runtime) -> None:
    cache = decode(compiled, 0, rows=2)
    assert lines(runtime)["1"] == "2 x 10 tokens stored, window not open yet"
    del cache


def test_counts(runtime: Runtime) -> None:
    counters = runtime.counters
    assert lines(runtime)["compiled"].startswith(
        f"{counters.captures} graphs captured, {runtime.pieces_compiled} pieces compiled in "
    )
    assert lines(runtime)["compiled"].endswith(
        f"(eager), {counters.links} programs linked, {counters.dropped} dropped"
    )


@pytest.mark.slow
def test_nothing_is_learned_under_a_plan_that_was_given(model: Any) -> None:
    plan = adaskip_fx.SkipPlan(SUBLAYERS, {SUBLAYERS[2]: "kv_only"}, {SUBLAYERS[2]: "kv_only"})  # type: ignore[dict-item]
    fast = adaskip_fx.compile(model, None, plan=plan, backend="eager")
    said = lines(runtime_of(fast))
    assert said["online"].startswith("off: the plan was given")
    assert said["K/V only"] == "attention 1"
    assert "skipped" not in said
    assert said["compiled"].startswith("1 graph captured, 0 pieces compiled")
    cache = decode(fast, 1)
    assert lines(runtime_of(fast))["1"] == "11 tokens stored, window off"
    del cache


@pytest.mark.parametrize(
    ("policy", "alpha", "expected"),
    [
        (adaskip_fx.AdaSkip(online=False), 1.5, "off by the policy"),
        (adaskip_fx.AdaSkip(), 1.0, "off: prefill skips nothing, so there is nothing to compare"),
    ],
)
def test_why_nothing_is_learned(
    compiled: Any,
    profile: adaskip_fx.Profile,
    monkeypatch: pytest.MonkeyPatch,
    policy: adaskip_fx.AdaSkip,
    alpha: float,
    expected: str,
) -> None:
    runtime = runtime_of(compiled)
    monkeypatch.setattr(runtime, "policy", policy)
    monkeypatch.setattr(runtime, "plan", policy.plan(profile, alpha))
    assert lines(runtime)["online"].startswith(expected)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["3.ffn"], "ffn 3"),
        (["9.ffn", "1.ffn", "2.ffn", "3.ffn"], "ffn 1-3 9"),
        (["1.ffn", "0.attention", "2.attention", "10.attention"], "attention 0 2 10, ffn 1"),
    ],
)
def test_sublayers_by_kind(names: list[str], expected: str) -> None:
    assert by_kind(map(adaskip_fx.Sublayer.parse, names)) == expected
