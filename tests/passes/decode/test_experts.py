"""Chosen experts as one operator, against every expert written out in float64."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_passes.decode.expert_ops import choose_experts, run_experts
from adaskip_passes.decode.fuse_experts import FuseExperts
from tests.support.eager_reference import relative_error
from tests.support.expert_reference import Experts, random_experts, written_out

RUN = torch.ops.adaskip.run_experts.default
CHOOSE = torch.ops.adaskip.choose_experts.default
PROJECT = torch.ops.adaskip.project.default
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
#: tokens, experts, chosen, transposed, interleaved, clamp, with biases
CASES = (
    (1, 4, 2, False, False, 0.0, False),
    (5, 8, 3, False, True, 0.0, True),
    (3, 4, 2, True, False, 0.7, False),
    (32, 5, 4, True, True, 0.7, True),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operator(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    one = random_experts(*case, dtype=dtype)
    got, expected = run_experts(*one.inputs), written_out(one)
    assert got.dtype == dtype
    assert relative_error(got.double(), expected) < DTYPES[dtype]


@pytest.mark.parametrize("field", ["up", "down", "up_bias", "down_bias", "shares", "alpha"])
def test_everything_counts(field: str) -> None:
    """The companion: what is changed is noticed."""
    one = random_experts(3, 4, 2, True, True, 0.7, True, dtype=torch.float32)
    got = run_experts(*one.inputs)
    before = getattr(one, field)
    setattr(one, field, before * 1.1 if isinstance(before, float) else before.clone() * 1.1)
    assert relative_error(got.double(), written_out(one)) > 1e-3


def test_a_number_that_no_expert_has_gives_nothing() -> None:
    one = random_experts(2, 4, 2, False, False, 0.0, False, dtype=torch.float32)
    one.chosen = torch.tensor([[4, -1], [1, 4]])
    got = run_experts(*one.inputs) - one.residual.view(2, -1)
    assert (got[0] == 0).all()
    assert (got[1] != 0).any()


def test_shapes_are_known_without_running() -> None:
    one = random_experts(3, 4, 2, True, True, 0.7, True, dtype=torch.bfloat16)
    torch.library.opcheck(run_experts, one.inputs)
    arguments = (torch.randn(3, 4, 8), 2, True, "share", torch.bfloat16)
    torch.library.opcheck(choose_experts, arguments)


# The pass ----------------------------------------------------------------------------------------


class Record(fx.Interpreter):
    """Puts on each node what it computes."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["example_value"] = value.clone() if isinstance(value, Tensor) else value
        return value


def fused(
    function: Any, *inputs: Tensor, in_place: bool = False, any_rows: bool = False
) -> fx.GraphModule:
    """Run the pass, and see that results stay the same; ``/=`` may be written as Dynamo does."""
    module = fx.symbolic_trace(function)
    for node in module.graph.find_nodes(op="call_function", target=operator.truediv):
        node.target = operator.itruediv if in_place else node.target
    expected = Record(module).run(*(t.clone() for t in inputs))
    FuseExperts(any_rows)(module)
    module.graph.lint()
    module.recompile()
    got = module(*(t.clone() for t in inputs))
    pairs = zip(_flat(got), _flat(expected), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) and a.dtype == b.dtype for a, b in pairs)
    return module


def _flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def choices(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    return [n.args[1:] for n in module.graph.nodes if n.target is CHOOSE]


def left(module: fx.GraphModule) -> int:
    """How many other calls there are than items of a choice."""
    nodes = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    return sum(n.target not in (CHOOSE, operator.getitem) for n in nodes)


def mixtral(scores: Tensor) -> Any:
    p = torch.nn.functional.softmax(scores.float(), dim=-1)
    values, places = torch.topk(p, 2, dim=-1)
    values /= values.sum(dim=-1, keepdim=True)
    return values, places


def qwen(scores: Tensor) -> Any:
    p = torch.nn.functional.softmax(scores, dtype=torch.float32, dim=-1)
    values, places = torch.topk(p, 2, dim=-1)
    values /= values.sum(dim=-1, keepdim=True)
    return values.to(torch.bfloat16), places


def gpt_oss(scores: Tensor) -> Any:
    values, places = torch.topk(scores, 2, dim=-1)
    return torch.nn.functional.softmax(values, dim=1, dtype=torch.float32), places


def places_alone(scores: Tensor) -> Any:
    return torch.topk(scores, k=2, dim=-1, sorted=False)[1]


@pytest.mark.parametrize(
    ("router", "choice"),
    [
        (mixtral, (2, True, "share", torch.float32)),
        (qwen, (2, True, "share", torch.bfloat16)),
        (gpt_oss, (2, False, "softmax", torch.float32)),
        (places_alone, (2, False, "", torch.float32)),
    ],
)
def test_a_router_is_one_choice(router: Any, choice: tuple[Any, ...]) -> None:
    for in_place in (False, True):
        module = fused(router, torch.randn(3, 8), in_place=in_place)
        assert choices(module) == [choice]
        assert left(module) == 0


def softmax_is_read(scores: Tensor) -> Any:
    p = torch.softmax(scores, -1)
    values, places = torch.topk(p, 2)
    return values, places, p * 2


def values_are_read(scores: Tensor) -> Any:
    values, places = torch.topk(scores, 2)
    total = values.sum(-1, keepdim=True)
    return values / total, places, values * 3


def test_what_something_else_reads_stays() -> None:
    assert choices(fused(softmax_is_read, torch.randn(3, 8))) == [(2, False, "", torch.float32)]
    assert choices(fused(values_are_read, torch.randn(3, 8))) == [(2, False, "", torch.float32)]


def other_dimension(scores: Tensor) -> Any:
    return torch.topk(scores, 2, dim=0)[0]


def smallest(scores: Tensor) -> Any:
    return torch.topk(scores, 2, largest=False)[0]


def written(scores: Tensor) -> Any:
    values, places = torch.topk(scores, 2)
    values.mul_(2)
    return values, places


@pytest.mark.parametrize("function", [other_dimension, smallest, written])
def test_other_choices_stay(function: Any) -> None:
    assert choices(fused(function, torch.randn(3, 8))) == []


def test_choices_among_many_stay() -> None:
    assert choices(fused(places_alone, torch.randn(2, 1024))) != []
    assert choices(fused(places_alone, torch.randn(2, 1025))) == []


def by_name(scores: Tensor) -> Any:
    return torch.topk(input=scores, k=2, dim=-1)[1]


@pytest.mark.parametrize("function", [mixtral, places_alone, by_name])
def test_choices_of_more_rows_than_a_step_has_stay_but_in_prompts(function: Any) -> None:
    assert choices(fused(function, torch.randn(1024, 8))) != []
    assert choices(fused(function, torch.randn(1025, 8))) == []
    assert choices(fused(function, torch.randn(1025, 8), any_rows=True)) != []
    assert choices(fused(function, torch.randn(2, 1025), any_rows=True)) == []


def adding(one: Experts, twice: bool) -> Any:
    def function(x: Tensor, residual: Tensor) -> Any:
        inputs = (x.view(-1, x.shape[-1]), *one.inputs[1:-1], None)
        y = torch.ops.adaskip.run_experts.default(*inputs).reshape(residual.shape)
        return (residual + y, y) if twice else residual + y

    return function


def test_experts_add_to_the_stream() -> None:
    one = random_experts(3, 4, 2, False, False, 0.0, False, dtype=torch.float32)
    x, residual = one.hidden.view(3, 1, -1), torch.randn(3, 1, one.hidden.shape[1])
    module = fused(adding(one, twice=False), x, residual)
    assert [n.args[-1] is not None for n in module.graph.nodes if n.target is RUN] == [True]
    assert not [n for n in module.graph.nodes if n.target is operator.add]
    module = fused(adding(one, twice=True), x, residual)  # the companion
    assert [n.args[-1] for n in module.graph.nodes if n.target is RUN] == [None]


@pytest.mark.parametrize("kind", ["", "computed later", "read besides", "broadcast", "to more"])
def test_experts_that_add_shared_ones_add_to_the_stream(kind: str) -> None:
    """As Qwen2-MoE has it, whose shared experts have a gate of their own."""
    one = random_experts(3, 4, 2, False, False, 0.0, False, dtype=torch.float32)
    *rest, _ = one.inputs
    width = one.hidden.shape[1]

    def function(hidden: Tensor, stream: Tensor, shared: Tensor, gate: Tensor) -> Any:
        stream = stream * 2 if kind == "computed later" else stream
        gated = torch.sigmoid(gate) * shared
        both = (RUN(hidden, *rest[1:], None) + gated).reshape(1, 3, -1)
        if kind == "read besides":
            return stream + both, both
        return stream[..., :1] + both if kind == "broadcast" else stream + both

    texts = 2 if kind == "to more" else 1  # each has the same added
    inputs = one.hidden, torch.randn(texts, 3, width), torch.randn(3, width), torch.randn(3, 1)
    module = fused(function, *inputs)
    (run,) = (n for n in module.graph.nodes if n.target is RUN)
    adds = [n for n in module.graph.nodes if n.target is operator.add]
    assert run.args[-1] is not None
    assert len(adds) == 1
    assert (run.args[-1] is adds[0]) == (kind == "")


def behind(kind: str) -> Any:
    """What shared experts add to the others, and both to the stream."""
    one = random_experts(3, 4, 2, False, False, 0.0, False, dtype=torch.float32)
    *rest, _ = one.inputs

    def function(hidden: Tensor, stream: Tensor, w: Tensor) -> Any:
        stream = stream * 2 if kind == "computed later" else stream
        routed = RUN(hidden, *rest[1:], None).view(1, 3, -1)
        shared = PROJECT(stream, [w], [], None, 0.0, "", routed)[0]
        if kind == "shared are read besides":
            return stream + shared, shared
        if kind == "routed are read besides":
            return stream + shared, routed
        return stream[..., :1] + shared if kind == "broadcast" else stream + shared

    width = one.hidden.shape[1]
    inputs = one.hidden, torch.randn(1, 3, width), torch.randn(width, width) / width
    return function, inputs


def test_experts_add_to_the_stream_behind_shared_ones() -> None:
    function, inputs = behind("")
    module = fused(function, *inputs)
    (run,) = (n for n in module.graph.nodes if n.target is RUN)
    assert str(run.args[-1]) == "stream"
    assert not any(n.target is operator.add for n in module.graph.nodes)


@pytest.mark.parametrize(
    "kind",
    ["computed later", "shared are read besides", "routed are read besides", "broadcast"],
)
def test_other_sums_with_shared_experts_stay(kind: str) -> None:
    function, inputs = behind(kind)
    module = fused(function, *inputs)
    (run,) = (n for n in module.graph.nodes if n.target is RUN)
    assert run.args[-1] is None
