"""Prompts of mixtures of experts as they are lowered for a GPU: what is called, and the results."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from adaskip_fx.api import build
from adaskip_fx.capture import experts, phase_graph
from adaskip_fx.capture.graph_key import GraphKey
from adaskip_fx.model.handle import runtime_of
from adaskip_passes import Pass, run_passes
from adaskip_passes.analysis.effects import operation
from adaskip_passes.partition.outer import piece_of
from tests.support.eager_reference import relative_error
from tests.support.families.all import tiny_config, tiny_model

TOLERANCE = 2e-5  # as of `test_lowered_families`
TOKENS = 41  # more than a step has
BESIDE_PRODUCTS = ["gather_grouped.default", "gate_grouped.default", "sum_grouped.default"]
OURS = Counter(["choose_experts.default", *BESIDE_PRODUCTS])
IN_GROUPS = Counter(["choose_in_groups.default", *BESIDE_PRODUCTS])
FAMILIES = {"mixtral": OURS, "gpt_oss": OURS, "qwen3_moe": OURS, "deepseek_v3": IN_GROUPS}
OFTEN = ("mixtral", "gpt_oss")
SOME = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
lowering = phase_graph._lowering


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu(key: GraphKey, backend: str) -> tuple[Pass, ...]:
        return lowering(replace(key, device=torch.device("cuda")), "inductor")

    monkeypatch.setattr(phase_graph, "_lowering", on_a_gpu)
    monkeypatch.setattr(experts, "has_kernels", lambda hidden: True)


def tiny(family: str) -> Any:
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    return tiny_model(tiny_config(family, num_hidden_layers=2, **layers))


@pytest.mark.parametrize("family", SOME)
def test_prompts_are_the_models(family: str) -> None:
    model = tiny(family)
    fast = build(model, None, backend="eager")
    ids = torch.randint(3, 50, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    for tokens in (TOKENS, TOKENS - 3):
        with torch.no_grad():
            got, want = (one(input_ids=ids[:, :tokens]).logits for one in (fast, model))
        assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("family", SOME)
def test_what_a_layer_calls(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    key = GraphKey.plain("prefill", torch.bfloat16, torch.device("cpu"))
    captured = runtime_of(build(model, None, backend="eager")).graphs.capture(key)
    pieces = map(piece_of, captured.outer.graph.find_nodes(op="call_module"))
    (ffn,) = [p for p in pieces if p is not None and p.name.startswith("layers_1_ffn")]
    graph = fx.Graph()
    graph.output(graph.graph_copy(ffn.module.graph, {}))
    before = Counter(operation(n) for n in graph.nodes if n.op.startswith("call_"))
    passes = phase_graph._lowering(key, "inductor")
    module = run_passes(fx.GraphModule(ffn.module, graph), passes, copy=False)
    after = Counter(operation(n) for n in module.graph.nodes if n.op.startswith("call_"))
    for name, count in FAMILIES[family].items():
        assert after[name] == count
    assert before["topk"]
    assert not after["topk"]
