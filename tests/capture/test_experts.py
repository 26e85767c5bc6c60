"""What is traced of experts: the operator for a few tokens, transformers' way elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from adaskip_fx.api import build
from adaskip_fx.capture import experts
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.testing.families import tiny_config, tiny_model
from adaskip_passes.decode.expert_ops import MAX_TOKENS
from tests.support.eager_reference import relative_error

RUN = torch.ops.adaskip.run_experts.default
KINDS = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module_of(name: str, kind: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = tiny_config(name)
    config._experts_implementation = experts.NAME
    module = (kind or KINDS[name])(config).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(-0.3, 0.3)
    return module


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.rand(tokens, 4).argsort(-1)[:, :2]
    return torch.randn(tokens, 32, dtype=dtype), chosen, torch.rand(tokens, 2, dtype=dtype)


def runs_operator(module: Any, given: tuple[Tensor, ...], dynamic: bool = False) -> bool:
    """Whether the operator is what is traced."""
    return any(node.target is RUN for node in traced(module, given, dynamic).graph.nodes)


def traced(module: Any, given: tuple[Tensor, ...], dynamic: bool) -> fx.GraphModule:
    """Return what is traced; results are compared with transformers' loop."""
    graphs: list[fx.GraphModule] = []

    def record(graph: fx.GraphModule, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for tensor in given if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled = torch.compile(
        module, backend=record, fullgraph=True, dynamic=None if dynamic else False
    )
    got = compiled(*given)
    module.config._experts_implementation = "eager"
    expected = module(*given)
    module.config._experts_implementation = experts.NAME
    assert relative_error(got, expected) < 1e-5
    (graph,) = graphs
    return graph


@pytest.mark.parametrize("name", KINDS)
def test_a_few_tokens_run_the_operator(name: str) -> None:
    assert runs_operator(module_of(name), inputs(1))
    assert runs_operator(module_of(name), inputs(MAX_TOKENS))


@pytest.mark.parametrize("name", KINDS)
def test_prompts_are_sorted_by_expert(name: str) -> None:
    """Also those of a length that is a symbol, which is not looked at."""
    assert not runs_operator(module_of(name), inputs(MAX_TOKENS + 1))
    assert not runs_operator(module_of(name), inputs(5), dynamic=True)


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "has_kernels", lambda hidden: True)


def targets_of(module: Any, given: tuple[Tensor, ...], dynamic: bool = False) -> set[Any]:
    return {node.target for node in traced(module, given, dynamic).graph.nodes}


#: What is beside the grouped products.
BESIDE = {
    torch.ops.adaskip.gather_grouped.default,
    torch.ops.adaskip.gate_grouped.default,
    torch.ops.adaskip.sum_grouped.default,
}


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("name", KINDS)
def test_prompts_on_cuda_run_operators_beside_the_products(name: str) -> None:
    for given, dynamic in ((inputs(MAX_TOKENS + 1), False), (inputs(5), True)):
        assert targets_of(module_of(name), given, dynamic) >= BESIDE
    assert not BESIDE & targets_of(module_of(name), inputs(3))
    assert not BESIDE & targets_of(module_of("mixtral", OtherGate), inputs(MAX_TOKENS + 1))
    wide = module_of(name, dtype=torch.float64)
    assert not BESIDE & targets_of(wide, inputs(MAX_TOKENS + 1, torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_prompts_on_a_cpu_do_not(name: str) -> None:
    assert not BESIDE & targets_of(module_of(name), inputs(MAX_TOKENS + 1))


class OtherGate(MixtralExperts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.tanh(gate) * up

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        if self.config._experts_implementation == experts.NAME:
            return experts.experts(self, hidden, chosen, shares)
        output = torch.zeros_like(hidden)
        for token, row in enumerate(chosen.tolist()):
            for place, expert in enumerate(row):
                gated = self._apply_gate(hidden[token] @ self.gate_up_proj[expert].T)
                output[token] += gated @ self.down_proj[expert].T * shares[token, place]
        return output


def test_other_gates_run_as_they_are() -> None:
    assert not runs_operator(module_of("mixtral", OtherGate), inputs(3))
    module = module_of("mixtral")
    module.act_fn = nn.GELU()
    assert not runs_operator(module, inputs(3))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_weights_that_are_no_parameters_run_as_they_are() -> None:
    module = module_of("mixtral")
    parametrize.register_parametrization(module, "down_proj", Doubled())
    assert not runs_operator(module, inputs(3))
    wide = module_of("mixtral", dtype=torch.float64)
    assert not runs_operator(wide, inputs(3, torch.float64))


# Whole models ------------------------------------------------------------------------------------


def step_targets(fast: Any, several: bool = False) -> set[Any]:
    """What the captured graphs of a decode step of one row, or of several, call."""
    (state,) = fast._adaskip.graphs.states.known
    keys = [k for k in state.captures if k.one_token and k.batch.vary == several]
    captured = [c for key in keys for c in state.captures[key]]
    assert captured
    return {node.target for c in captured for node in c.capture.graph.graph.nodes}


def logits(fast: Any, ids: Tensor) -> Tensor:
    cache = fast.adaskip.new_cache()
    parts = (ids[:, :-1], ids[:, -1:])
    return torch.cat([fast(input_ids=i, past_key_values=cache).logits for i in parts], 1)


def test_eager_experts_are_exchanged_in_the_compiled_model_alone() -> None:
    model = tiny_model(tiny_config("mixtral", num_hidden_layers=2, experts_implementation="eager"))
    fast = build(model, None, backend="eager")
    runtime_of(fast).static_cache = True  # as on a GPU
    for rows in (1, 3):  # a step of several has a graph for up to so many as a kernel takes
        ids = torch.randint(0, 50, (rows, 7))
        assert relative_error(logits(fast, ids), model(input_ids=ids).logits) < 1e-5
        assert RUN in step_targets(fast, rows > 1)
    assert model.get_experts_implementation() == {"": "eager"}
    assert fast.get_experts_implementation() == {"": experts.NAME}
    reference = fast._adaskip.graphs.states.current.reference
    with reference.implementations_of(fast):
        assert fast.get_experts_implementation() == {"": "eager"}
    assert fast.get_experts_implementation() == {"": experts.NAME}


def half(module: Any, *inputs: Tensor) -> Tensor:
    output: Tensor = ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *inputs)
    return output / 2


@pytest.mark.slow
def test_registered_experts_run_as_they_are() -> None:
    ALL_EXPERTS_FUNCTIONS.register("half", half)
    model = tiny_model(tiny_config("mixtral", num_hidden_layers=2, experts_implementation="half"))
    fast, ids = build(model, None, backend="eager"), torch.randint(0, 50, (1, 7))
    expected = model(input_ids=ids).logits
    assert relative_error(logits(fast, ids), expected) < 1e-5
    assert RUN not in step_targets(fast)
    model.set_experts_implementation("batched_mm")  # the companion
    assert relative_error(model(input_ids=ids).logits, expected) > 1e-2
