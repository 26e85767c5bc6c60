"""Decode steps as they are lowered for a GPU: what is left beside our operators, and the results.

The eager model computes in float32; of sums in another order 2e-5 of the largest logit may differ,
as for all families (`tests/model_support/matrix.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from adaskip_fx.api import build
from adaskip_fx.capture import phase_graph
from adaskip_fx.capture.batch_sizes import BatchSizes
from adaskip_fx.capture.graph_key import GraphKey
from adaskip_fx.model.handle import runtime_of
from adaskip_passes import Pass, run_passes
from adaskip_passes.analysis.effects import operation
from adaskip_passes.partition.outer import Piece, piece_of
from tests.support.eager_reference import relative_error
from tests.support.families.all import tiny_config, tiny_model

TOLERANCE = 2e-5
PROMPT, STEPS = 6, 3
#: They move nothing, or stand for a part of something.
VIEWS = {
    "view",
    "view_as",
    "expand",
    "reshape",
    "transpose",
    "unsqueeze",
    "getitem",
    "contiguous",
    "split",
    "chunk",
}
RMS_NORM = {"to": 2, "pow": 1, "mean": 1, "add": 1, "rsqrt": 1, "mul": 2}


def times(count: int, operations: dict[str, int]) -> Counter[str]:
    return Counter({name: count * number for name, number in operations.items()})


#: What each family's last layer has besides. Norms after a branch wait for all of it; those of all
#: heads together, OLMo 2's, stay as well. A layer that alone has no window makes its
#: bounds. Before experts there is a norm that they and their router read. Of a latent the norm is
#: stored; queries of it are made and put together in products of their own.
AFTER_BRANCHES = times(2, RMS_NORM) + Counter({"add": 2})
LATENT = times(1, RMS_NORM) + Counter(["into_latent", "cat", "out_of_latent", "project.default"])
COMPLEX = Counter({"to": 2, "view_as_real": 1, "select": 2, "mul": 1})
CHOICE = Counter(["project.default", "choose_experts.default", "run_experts.default"])
EXPERTS = Counter(["project.default", "choose_in_groups.default", "run_experts.default"])
LEFT: dict[str, Counter[str]] = {
    **{name: Counter() for name in ("llama", "phi3", "glm", "helium", "ernie4_5", "granite")},
    **{name: Counter() for name in ("cohere", "phi", "gpt_neox", "stablelm", "starcoder2")},
    "falcon_h1": Counter(),  # but for its mixer
    "cohere2": Counter({"to": 1, "zeros_like": 1, "add": 3, "stack": 1}),
    "glm4": AFTER_BRANCHES,
    "qwen2_moe": times(1, RMS_NORM)
    + Counter(["project.default", "choose_experts.default", "run_experts.default"])
    + Counter(["sigmoid", "mul", "add"]),
    "deepseek_v3": LATENT + times(1, RMS_NORM) + EXPERTS,
    "deepseek_v2": LATENT + times(1, RMS_NORM) + CHOICE + COMPLEX,
    "minicpm3": LATENT,
    "glm4_moe": times(1, RMS_NORM) + EXPERTS,
    "dots1": times(1, RMS_NORM) + EXPERTS,
    "qwen3": Counter(),
    "olmo2": AFTER_BRANCHES + times(2, RMS_NORM),
    "nemotron": Counter({"add": 2, "layer_norm": 2}),
    "persimmon": Counter({"layer_norm": 2}),
}
LATENTS = ("deepseek_v2", "deepseek_v3", "minicpm3")
KINDS = {"cohere2": {"layer_types": ["sliding_attention", "full_attention"]}}
OFTEN = ("llama", "qwen3", "cohere", "glm4", "phi", "falcon_h1", "mamba2")
FAMILIES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in LEFT]
#: What a decode step of Mamba's stream in float32 has no kernels of its own for.
OF_A_STREAM = {"pow", "mean", "rsqrt", "normalize.default"}
on_cpu = phase_graph._lowering


def as_on_a_gpu(key: GraphKey, backend: str) -> tuple[Pass, ...]:
    on_gpu = replace(key, device=torch.device("cuda"))
    return on_cpu(on_gpu, "inductor") if key.static_cache else ()


def tiny(family: str) -> Any:
    return tiny_model(tiny_config(family, num_hidden_layers=2, **KINDS.get(family, {})))


def step_of(rows: int) -> GraphKey:
    plain = GraphKey.plain("decode", torch.bfloat16, torch.device("cpu"))
    return replace(plain, batch=BatchSizes.around(rows, 1), static_tokens=1)


def operations(piece: Piece, passes: Sequence[Pass]) -> Counter[str]:
    """What a piece calls when it is lowered, but for views."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(piece.module.graph, {}))
    module = run_passes(fx.GraphModule(piece.module, graph), passes, copy=False)
    called = [operation(n) for n in module.graph.nodes if n.op.startswith("call_")]
    return Counter(name for name in called if name not in VIEWS)


def left_of_a_layer(family: str, rows: int = 1) -> Counter[str]:
    model = tiny(family).to(torch.bfloat16)
    key = step_of(rows)
    captured = runtime_of(build(model, None, backend="eager")).graphs.capture(key)
    pieces = map(piece_of, captured.outer.graph.find_nodes(op="call_module"))
    last = [piece for piece in pieces if piece is not None and piece.name.startswith("layers_1_")]
    last = [piece for piece in last if not piece.name.endswith("mixer")]
    assert len(last) == 2
    passes = as_on_a_gpu(key, "eager")
    return operations(last[0], passes) + operations(last[1], passes)


@pytest.mark.parametrize("family", FAMILIES)
def test_little_is_left_of_a_layer(family: str) -> None:
    attention = "store_and_attend_latent" if family in LATENTS else "store_and_attend"
    ours = Counter({"project.default": 4, f"{attention}.default": 1})
    assert left_of_a_layer(family) == ours + LEFT[family]


@pytest.mark.parametrize("family", ["mamba2", pytest.param("mamba", marks=pytest.mark.slow)])
def test_a_stream_in_float32_is_part_of_projections(family: str) -> None:
    model, key = tiny(family).to(torch.bfloat16), step_of(1)
    assert model.config.residual_in_fp32
    captured = runtime_of(build(model, None, backend="eager")).graphs.capture(key)
    pieces = map(piece_of, captured.outer.graph.find_nodes(op="call_module"))
    (mixer,) = [piece for piece in pieces if piece is not None and "layers_1_" in piece.name]
    lowered = operations(mixer, as_on_a_gpu(key, "eager"))
    assert OF_A_STREAM.isdisjoint(lowered)
    assert {"pow", "mean", "rsqrt"} <= operations(mixer, ()).keys()
    assert lowered["project.default"] == {"mamba2": 2, "mamba": 3}[family]


@pytest.mark.parametrize("family", [*FAMILIES, "mamba2"])
def test_steps_are_the_models(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phase_graph, "_lowering", as_on_a_gpu)
    model = tiny(family)
    fast = build(model, None, backend="eager", static_cache=True)
    ids = torch.randint(3, 53, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        name = runtime_of(fast).cache_argument
        cache = getattr(fast(ids[:, :PROMPT], use_cache=True), name)
        want = model(ids).logits
        for at in range(PROMPT, PROMPT + STEPS):
            got = fast(ids[:, at : at + 1], **{name: cache}).logits
            assert relative_error(got, want[:, at : at + 1]) < TOLERANCE
    assert runtime_of(fast).runner.static.why_not is None
