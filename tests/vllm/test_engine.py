"""What a plan does to an engine: its K/V cache, its compiled programs, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaskip_fx.plans.skip_plan import PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.serving.overrides import overrides
from tests.vllm import models, reference
from tests.vllm.engines import PROMPT, engine, generated, known_in_process, runner

SUBLAYERS = [Sublayer(i, k) for i in range(models.LAYERS) for k in ("attention", "ffn")]
EMPTY = SkipPlan.empty(SUBLAYERS)
HALF = SkipPlan.of(SUBLAYERS, ["1.attention", "2.attention"])
WINDOWED = EMPTY.with_windows(Windows.of(["1.attention", "2.attention"], Window(32, 0)))
BLOCK = 32  # tokens


@pytest.fixture(scope="module")
def llama(folders: models.Folders) -> Path:
    known_in_process(folders["llama"])
    return folders["llama"]


@dataclass(frozen=True)
class Held:
    """What an engine has room for, and what it writes."""

    blocks: int
    layers: int  #: with K/V
    tokens: float  #: of one layer, held for a request of 209 tokens
    written: tuple[list[int], list[dict[int, float]]]


def held(llm: Any) -> Held:
    """What `llm` holds."""
    made = runner(llm)
    blocks, layers = made.kv_cache_config.num_blocks, len(made.kv_caches)
    return Held(blocks, layers, stored(llm, 200, 10), generated(llm, PROMPT, 4))


@pytest.fixture(scope="module")
def stock(llama: Path) -> Held:
    """The model without a plan."""
    with engine(llama, block_size=BLOCK) as llm:
        return held(llm)


def stored(llm: Any, prompt: int, steps: int) -> float:
    """Tokens of one layer that a request holds while it decodes."""
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    config = runner(llm).kv_cache_config
    free = pool.get_num_free_blocks()
    wanted = SamplingParams(
        temperature=0.0, max_tokens=steps + 8, ignore_eos=True, detokenize=False
    )
    tokens = {"prompt_token_ids": [7 + i % 50 for i in range(prompt)]}
    llm.llm_engine.add_request("one", tokens, wanted)
    for _ in range(steps):
        llm.llm_engine.step()
    used = free - pool.get_num_free_blocks()
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    layers = max(len(group.layer_names) for group in config.kv_cache_groups)
    return float(used * layers * BLOCK)


def test_skipped_attention_holds_no_keys_and_values(
    llama: Path, stock: Held, tmp_path: Path
) -> None:
    found = {}
    for name, plan in (("half", HALF), ("windowed", WINDOWED)):
        with engine(llama, overrides(plan, tmp_path), block_size=BLOCK) as llm:
            found[name] = held(llm)
    half, windowed = found["half"], found["windowed"]
    whole = 7 * BLOCK  # 209 tokens in whole blocks
    assert (stock.layers, stock.tokens) == (4, 4 * whole)
    assert (half.layers, half.tokens) == (2, 2 * whole)
    assert half.blocks == 2 * stock.blocks  # of the same memory, twice the blocks
    assert windowed.layers == 4
    # Two layers hold everything; two hold the window, which may begin and end inside of blocks.
    assert windowed.tokens <= 2 * whole + 2 * 2 * BLOCK


def test_a_changed_plan_with_a_warm_cache(folders: models.Folders, tmp_path: Path) -> None:
    """Two plans whose graphs differ in one number, compiled: neither runs the other's program."""
    known_in_process(folders["short"])
    model = folders.reference("short")
    one, other = Sublayer(0, "ffn"), Sublayer(1, "attention")
    weight = np.random.default_rng(0).normal(0, 0.05, (128, 128))
    linear = Surrogate("linear", {"weight": weight, "bias": np.zeros(128)})
    seen = set()
    for factor in (0.8, 1.25):
        surrogates = Surrogates({one: linear, other: Surrogate.scale(factor)})
        plan = SkipPlan.of(SUBLAYERS[:4], [one, other], surrogates=surrogates)
        with engine(folders["short"], overrides(plan, tmp_path), enforce_eager=False) as llm:
            seen.add(llm.llm_engine.vllm_config.model_config.compute_hash())
            tokens, found = generated(llm, PROMPT, 4)
        instead = {"0.ffn": reference.affine(weight, np.zeros(128))}
        instead["1.attention"] = reference.scale(factor)
        wanted = reference.log_probabilities(model, PROMPT + tokens, instead)
        errors = [
            abs(float(wanted[at, token]) - value)
            for at, values in enumerate(found)
            for token, value in values.items()
        ]
        assert max(errors) < 1e-4, factor
    assert len(seen) == 2  # what vLLM names its compiled programs by


def another_model(plan: SkipPlan) -> dict[str, Any]:
    more = [*SUBLAYERS, Sublayer(models.LAYERS, "attention"), Sublayer(models.LAYERS, "ffn")]
    return json.loads(json.dumps(overrides(SkipPlan.of(more, plan.prefill), ".")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adaskip": {"schema": 2}}, "adaskip of the model's configuration: missing digest"),
        ({"adaskip": "plan.json"}, "not an object but 'plan.json'"),
        (another_model(HALF), "has 10 sublayers, 0.attention to 4.ffn, but the model's 4 layers"),
        (
            overrides(EMPTY.with_windows(Windows.of(["1.attention"], Window(32, 4))), "."),
            r"1.attention: window 4\+32 shows the first 4 tokens, .*--layers --sinks 0",
        ),
        (
            overrides(EMPTY.with_windows(Windows.of(["1.attention"], Window(32, 0, (1,)))), "."),
            r"window 0\+32 \(K/V heads 1 full\) is of some K/V heads",
        ),
    ],
    ids=["no plan", "a path", "another model", "sinks", "heads"],
)
def test_a_bad_plan_is_refused(given: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(PlanError, match=message), engine(llama, given):
        pass


def test_an_architecture_without_a_layout_refuses_a_plan(
    folders: models.Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And runs without one."""
    from adaskip_fx.serving import layer_proof

    known_in_process(folders["qwen2"])
    monkeypatch.setattr(layer_proof, "layouts_of", lambda layer: ())
    with engine(folders["qwen2"]) as llm:
        assert len(generated(llm, PROMPT, 2)[0]) == 2
    refusal = pytest.raises(PlanError, match="Qwen2DecoderLayer: no plan can be served")
    with refusal, engine(folders["qwen2"], overrides(HALF, tmp_path)):
        pass


def test_a_window_that_shows_every_token_is_no_window(
    llama: Path, stock: Held, tmp_path: Path
) -> None:
    """Also with sinks, which vLLM has not: no request is long enough to notice."""
    plan = EMPTY.with_windows(Windows.of(["1.attention"], Window(60, 4)))
    with engine(llama, overrides(plan, tmp_path), max_model_len=64, block_size=BLOCK) as llm:
        assert generated(llm, PROMPT, 4) == stock.written
