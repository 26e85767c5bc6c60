"""The kernels of chosen experts against float64, recorded, and in the step of a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.testing.families import tiny_model
from adaskip_passes.decode.expert_ops import choose_experts, run_experts
from adaskip_passes.decode.router_ops import choose_in_groups
from adaskip_passes.grouped_experts.ops import gate_grouped, gather_grouped, sum_grouped
from tests.support.eager_reference import relative_error
from tests.support.expert_reference import Experts, random_experts, written_out
from tests.support.families.experts import EXPERTS
from tests.support.grouped_reference import gated_by_row, random_rows, summed_by_token
from tests.support.router_reference import chosen_in_groups

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
#: transposed, interleaved, clamp, with biases
KINDS = (
    (False, False, 0.0, False),
    (False, True, 0.7, True),
    (True, False, 0.0, True),
    (True, True, 0.7, True),
)


def random(
    kind: tuple[Any, ...], tokens: int, dtype: torch.dtype, count: int = 3, **sizes: int
) -> Experts:
    return random_experts(tokens, 8, count, *kind, dtype=dtype, device="cuda", **sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "count"), [(1, 3), (1, 5), (2, 3), (16, 3), (17, 3), (32, 3)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_kernels(kind: tuple[Any, ...], tokens: int, count: int, dtype: torch.dtype) -> None:
    for sizes in ({"width": 320, "inner": 136}, {"width": 2880, "inner": 1024}):
        one = random(kind, tokens, dtype, count, **sizes)
        got, expected = run_experts(*one.inputs), written_out(one)
        assert relative_error(got.double(), expected) < DTYPES[dtype]
        one.chosen = one.chosen.flip(0) if tokens > 1 else (one.chosen + 1) % 8
        again = run_experts(*one.inputs)
        assert relative_error(again.double(), expected) > DTYPES[dtype]  # the companion


def test_errors_beside_those_of_plain_torch() -> None:
    """Sums and the gate are in float32, so the error is no larger than that of products alone."""
    one = random(KINDS[0], 4, torch.bfloat16, width=2048, inner=768)
    on_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in one.inputs]
    expected = written_out(one)
    ours = relative_error(run_experts(*one.inputs).double(), expected)
    theirs = relative_error(run_experts(*on_cpu).cuda().double(), expected)
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize(("tokens", "count"), [(1, 3), (1, 5), (8, 3)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_recorded_graph_follows_the_choice(
    kind: tuple[Any, ...], tokens: int, count: int
) -> None:
    one = random(kind, tokens, torch.bfloat16, count, width=320, inner=136)
    run_experts(*one.inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_experts(*one.inputs)
    for turn in range(4):
        one.chosen.copy_((one.chosen + turn) % 9)  # the last one is none of them
        one.hidden.normal_()
        graph.replay()
        assert relative_error(got.double(), written_out(one)) < DTYPES[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "inner"), [(72, 40), (2048, 768), (2880, 2880)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_beside_grouped_products(
    kind: tuple[Any, ...], width: int, inner: int, dtype: torch.dtype
) -> None:
    sizes: dict[str, Any] = {"width": width, "inner": inner, "device": "cuda"}
    one = random_rows(37, 8, 3, *kind[1:], dtype=dtype, **sizes)
    for got, expected in (
        (gate_grouped(*one.gate_inputs), gated_by_row(one)),
        (sum_grouped(*one.sum_inputs), summed_by_token(one)),
    ):
        assert got.dtype == dtype
        assert relative_error(got.double(), expected) < DTYPES[dtype]
    order = torch.randperm(3 * 37, device="cuda")
    hidden = one.outputs[:37]
    assert torch.equal(gather_grouped(hidden, order, 3), hidden[order // 3])
    one.places, one.interleaved = one.places.flip(1), not one.interleaved
    assert relative_error(gate_grouped(*one.gate_inputs).double(), gated_by_row(one)) < 1e-2
    assert relative_error(sum_grouped(*one.sum_inputs).double(), expected) > DTYPES[dtype]


@pytest.mark.parametrize("after", ["", "share", "softmax"])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("rows", "among", "count"), [(1, 128, 8), (32, 7, 2), (5, 1000, 16)])
def test_choices(rows: int, among: int, count: int, softmax: bool, after: str) -> None:
    scores = torch.rand(rows, among, device="cuda")
    values, places = choose_experts(scores, count, softmax, after, torch.float32)
    wide = scores.double()
    if softmax:
        wide = wide.exp() / wide.exp().sum(-1, keepdim=True)
    ordered = sorted_places(wide, count)
    expected = wide.gather(1, ordered)
    if after == "softmax":
        expected = expected.exp()
    if after:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(places, ordered)
    assert relative_error(values.double(), expected) < 1e-6


def sorted_places(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.argsort(-1, descending=True)[:, :count]


def test_choices_of_odd_scores_are_within() -> None:
    """Equal ones: the first; and whatever comes of NaN, no weights beyond the last are read."""
    scores = torch.zeros(2, 10, device="cuda")
    scores[1] = float("nan")
    _, places = choose_experts(scores, 3, True, "share", torch.bfloat16)
    assert places[0].tolist() == [0, 1, 2]
    assert 0 <= int(places.min()) <= int(places.max()) < 10


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:\\nOnline softmax is disabled")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "glm4_moe"]
)
def test_steps_of_a_model(name: str, rows: int) -> None:
    """Recorded steps in float32, after a prompt and with an FFN skipped."""
    model = tiny_model(EXPERTS[name].config()).cuda()
    fast = build(model, None, backend="inductor")
    ids = torch.randint(0, 50, (rows, 14), device="cuda")
    expected = model(input_ids=ids, use_cache=False).logits
    cache = fast.adaskip.new_cache()
    fast(input_ids=ids[:, :8], past_key_values=cache)
    for t in range(8, 14):
        got = fast(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
        assert relative_error(got[:, -1], expected[:, t]) < 1e-4


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:\\nOnline softmax is disabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe"]
)
def test_prompts_of_a_model(name: str, dtype: torch.dtype) -> None:
    """Of several lengths and rows, one graph; in bfloat16 a choice may flip."""
    model = tiny_model(EXPERTS[name].config()).cuda().to(dtype)
    fast = build(model, None, backend="inductor")
    for rows, tokens in ((1, 90), (1, 73), (2, 60)):
        ids = torch.randint(0, 50, (rows, tokens), device="cuda")
        got, expected = (one(input_ids=ids, use_cache=False).logits for one in (fast, model))
        off = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
        assert float(off.median()) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize(
    ("experts", "count", "groups", "kept"),
    [(256, 8, 8, 4), (160, 8, 1, 1), (24, 5, 3, 2), (10, 6, 5, 3), (1024, 16, 8, 4)],
)
def test_choices_among_groups(
    experts: int, count: int, groups: int, kept: int, rows: int, share: bool
) -> None:
    torch.manual_seed(experts)
    logits, bias = 2 * torch.randn(rows, experts, device="cuda"), torch.randn(experts).cuda()
    how = count, groups, kept, share, 2.5
    values, places = choose_in_groups(logits, bias, *how)
    expected, ordered = chosen_in_groups(logits, bias, *how)
    assert torch.equal(places.cpu(), ordered)
    assert relative_error(values.double().cpu(), expected) < 1e-6
    _, others = choose_in_groups(logits, 0 * bias, *how)
    assert not torch.equal(others.cpu(), ordered)


def test_odd_logits_choose_experts_that_there_are() -> None:
    logits = torch.full((2, 24), float("nan"), device="cuda")
    logits[1] = 0
    _, places = choose_in_groups(logits, torch.zeros(24, device="cuda"), 5, 3, 2, True, 1.0)
    assert places[1].tolist() == [0, 1, 2, 3, 4]
    assert 0 <= int(places.min()) <= int(places.max()) < 24
