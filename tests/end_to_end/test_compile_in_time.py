"""`compile` with a context: alpha is time there, and the plan says what it is predicted to gain."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaskip_fx
from adaskip_fx.api import build
from adaskip_fx.latency.terms import Costs, TableError
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies import AdaSkip
from adaskip_fx.profiles.fingerprint import Fingerprint
from adaskip_fx.programs.counted_times import counted_times
from adaskip_fx.programs.program_cache import Graphs
from benchmarks import floors
from tests.support.compiled_llamas import make_model
from tests.support.families.all import tiny_config, tiny_model
from tests.support.tokenizers import Letters

NAMES = tuple(Sublayer(n, kind) for n in range(2) for kind in ("attention", "ffn"))
FULL = SkipPlan.empty(NAMES)
WINDOW = Window(40, 3)

TEXTS = ("A decoder adds to its residual stream, twice a layer.", "sixteen letters.")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def of_model(model: Any) -> adaskip_fx.Profile:
    return adaskip_fx.calibrate(model, Letters(), TEXTS, 100, windows=[Window(10, 2)])


@pytest.fixture(scope="module")
def graphs(model: Any) -> Graphs:
    return runtime_of(build(model, None, backend="eager")).graphs


def test_compile_counts_time_at_a_context(model: Any, of_model: adaskip_fx.Profile) -> None:
    fast = adaskip_fx.compile(model, of_model, 1.3, context=500, backend="eager")
    assert dict(fast.adaskip.plan.windows.decode)  # type: ignore[union-attr]
    said = str(fast.adaskip)
    assert re.search(
        r"policy +predicted at 500 tokens: prefill 1\.[34]\d?x, decode 1\.[34]\d?x "
        r"\(counted from bytes and operations, not measured\)\n +0 of 4 sublayers skipped, windows "
        r"in \d of 4 K/V heads.*\n +change of the stream: 0 by skipping and 0\.0",
        said,
    ), said
    assert "off: the policy that chose the plan learns nothing" in said
    ids = torch.tensor([[5, 9, 2, 33, 7] * 8])
    assert fast.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 42)


def test_without_context_plans_are_the_papers(model: Any, of_model: adaskip_fx.Profile) -> None:
    fast = adaskip_fx.compile(model, of_model, 1.3, backend="eager")
    assert fast.adaskip.plan == AdaSkip().plan(of_model, 1.3)
    assert fast.adaskip.plan.digest == AdaSkip().plan(of_model, 1.3).digest
    assert not AdaSkip().plan(of_model, 1.3).windows
    assert "predicted" not in str(fast.adaskip)


def test_a_table_that_was_saved(
    model: Any, of_model: adaskip_fx.Profile, graphs: Graphs, tmp_path: Path
) -> None:
    """Its times decide: here windows save nothing, and an ffn nearly everything."""
    times = counted_times(graphs, 500, [Window(10, 2)])
    costs = []
    for c in times.costs:
        dear = {n: 1.0 if n == "ffn" else 0.001 for n in c.seconds}
        costs.append(Costs(c.phase, c.context, dear))
    planted = dataclasses.replace(times, costs=tuple(costs))
    planted.save(tmp_path / "table.json")
    path = str(tmp_path / "table.json")
    fast = adaskip_fx.compile(model, of_model, 1.5, context=500, table=path, backend="eager")
    plan = fast.adaskip.plan
    assert isinstance(plan, SkipPlan)
    assert [s.kind for s in plan.skipped("decode")] == ["ffn"]
    assert not plan.windows
    low = Surrogates({NAMES[1]: Surrogate("diagonal", {"factor": np.ones(32)})})
    fast.adaskip.plan = SkipPlan.of(NAMES, [NAMES[1]], surrogates=low)
    assert "no prediction: the cost of 'diagonal' was not measured" in str(fast.adaskip)


def test_what_compile_refuses(model: Any, of_model: adaskip_fx.Profile, graphs: Graphs) -> None:
    table = counted_times(graphs, 100)
    other = dataclasses.replace(table, fingerprint=Fingerprint("a" * 16, "other", 1, "b" * 16))

    def refused(message: str, alpha: float = 1.2, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            adaskip_fx.compile(model, of_model, alpha, backend="eager", **options)

    refused("table tells the times at a context: give context= as well", table=table)
    refused("an explicit plan was given", context=500, plan=FULL)
    refused("a policy was given", context=500, policy=AdaSkip())
    refused("the table is of the model", context=100, table=other)
    refused("500 tokens: measured were 100", context=500, table=table)
    refused(r"alpha 99 cannot be met at 500 tokens: the best", 99, context=500)


# times that are counted


@pytest.mark.parametrize("context", [10, 500])
def test_counted_times_are_the_floors(model: Any, graphs: Graphs, context: int) -> None:
    """The benchmarks count another way; they leave out norms."""
    times = counted_times(graphs, context, [WINDOW])
    some = Windows.of({NAMES[0]: WINDOW, NAMES[2]: Window(40, 3, (1,))})
    plans = [FULL, *(SkipPlan.of(NAMES, [s]) for s in NAMES), FULL.with_windows(some)]
    for plan in plans:
        read = floors.decode_bytes(model, plan, context)
        assert times.predict(plan, "decode", context) == pytest.approx(
            floors.decode_bytes(model, FULL, context) / read, rel=0.01
        )
        assert times.predict(plan, "prefill", context) == pytest.approx(
            floors.prefill_flop(model, FULL, context) / floors.prefill_flop(model, plan, context)
        )
    times.check(model)


def test_experts_and_sliding_windows_are_counted_as_far_as_they_go() -> None:
    """A token goes to some of the experts, and sees what its layer shows; float32, by hand."""
    mixtral = tiny_model(tiny_config("mixtral"))
    config, layer = mixtral.config, mixtral.model.layers[0]
    share = config.num_experts_per_tok / config.num_local_experts
    assert share < 1
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    others = layer.mlp.gate.weight.numel() + layer.post_attention_layernorm.weight.numel()
    times = counted_times(runtime_of(build(mixtral, None, backend="eager")).graphs, 1000)
    assert times.cost("ffn", "decode", 1000) * 1e12 == pytest.approx(4 * (share * experts + others))

    gemma = tiny_model(tiny_config("gemma2"))
    config, layer = gemma.config, gemma.model.layers[0]
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    assert kinds == [True, False, True]
    assert config.sliding_window < 1000
    times = counted_times(runtime_of(build(gemma, None, backend="eager")).graphs, 1000, [WINDOW])
    assert times.classes[::2] == ("attention 1", "attention 2", "attention 1")
    assert times.kv_heads[::2] == (0, config.num_key_value_heads, 0)
    stored = 2 * config.num_key_value_heads * config.head_dim
    sees = {"1": config.sliding_window, "2": 1000, "2, window 3+40": 43}
    weights = sum(p.numel() for p in layer.self_attn.parameters()) + 2 * config.hidden_size
    for name, seen in sees.items():
        read = times.cost(f"attention {name}", "decode", 1000) * 1e12
        assert read == pytest.approx(4 * (weights + seen * stored))


def test_layers_that_cannot_be_counted(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "adaskip_fx.programs.counted_times.unusual_layers", lambda model: "2 Linear4bit"
    )
    with pytest.raises(TableError, match="the time of 2 Linear4bit cannot be told from bytes"):
        counted_times(graphs, 100)
