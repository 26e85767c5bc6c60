"""Mixers' prompts as they are traced: one graph for all lengths, against the eager model.

The eager model computes in float32; of sums in another order 2e-5 of the largest logit may differ,
as for all families (`tests/model_support/matrix.py`). Decays are so small that a state remembers
some hundred tokens: what chunks hand on to each other is seen.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from adaskip_fx.api import build
from adaskip_fx.capture import mixers, phase_graph
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.testing.families import tiny_model
from adaskip_fx.utils.kernel_functions import kernel_or_torch
from adaskip_passes import FuseProjections, PassResult
from adaskip_passes.analysis.effects import operation
from adaskip_passes.decode.write_out_products import WriteOutProducts
from adaskip_passes.mixers import delta_rule
from tests.support.eager_reference import assert_close
from tests.support.families.all import tiny_config

TOLERANCE = 2e-5
#: One chunk of 64 tokens or less, its ends, and several.
LENGTHS = (5, 63, 64, 65, 200)


def remembering(family: str, **changes: Any) -> Any:
    model = tiny_model(tiny_config(family, **{"num_hidden_layers": 2, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-5, -3)
    return model


@pytest.fixture(scope="module")
def delta() -> Iterator[tuple[Any, Any]]:
    kinds = ["linear_attention", "full_attention"]
    model = remembering("qwen3_5", layer_types=kinds)
    yield model, build(model, None, backend="eager", static_cache=False)
    torch._dynamo.reset()


def tokens(rows: int, count: int) -> torch.Tensor:
    return torch.randint(0, 61, (rows, count), generator=torch.Generator().manual_seed(count))


def last_logits(model: Any, ids: torch.Tensor, ends: tuple[int, ...], **given: Any) -> list[Any]:
    """Of a text that is read in pieces."""
    fast = hasattr(model, "adaskip")
    cache = model.adaskip.new_cache() if fast else DynamicCache(config=model.config)
    logits, begin = [], 0
    for end in ends:
        part = {n: t[:, :end] if "mask" in n else t[:, begin:end] for n, t in given.items()}
        with torch.no_grad():
            output = model(ids[:, begin:end], past_key_values=cache, logits_to_keep=1, **part)
        logits.append(output.logits)
        begin = end
    return logits


def assert_as_eager(pair: tuple[Any, Any], ids: torch.Tensor, *ends: int, **given: Any) -> None:
    model, fast = pair
    both = (last_logits(m, ids, ends or (ids.shape[1],), **given) for m in (fast, model))
    for end, got, want in zip(ends or (0,), *both, strict=True):
        assert_close(got, want, TOLERANCE, f"logits after {end} of {ids.shape[1]} tokens")


def test_prompts_of_any_length_have_one_graph(delta: tuple[Any, Any]) -> None:
    stats = delta[1].adaskip.stats
    assert_as_eager(delta, tokens(1, LENGTHS[0]))
    before = stats().captures
    for count in LENGTHS:
        assert_as_eager(delta, tokens(1, count))
    assert stats().captures == before


def test_a_turn_begins_with_the_state_before(delta: tuple[Any, Any]) -> None:
    assert_as_eager(delta, tokens(1, 200), 70, 103, 170)


def test_padding(delta: tuple[Any, Any]) -> None:
    ids = tokens(3, 90)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :66] = 0, 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    assert_as_eager(delta, ids, attention_mask=mask, position_ids=places)


def test_a_skipped_mixer(delta: tuple[Any, Any]) -> None:
    model, fast = delta
    runtime, hooked = runtime_of(fast), copy.deepcopy(model)
    layer = hooked.model.layers[0].linear_attn
    layer.register_forward_hook(lambda module, arguments, output: 0 * output)
    mixer = next(s for s in runtime.sublayers if s.kind == "mixer")
    runtime.plan = SkipPlan.of(runtime.sublayers, [mixer])
    try:
        assert_as_eager((hooked, fast), tokens(1, 100))
        with pytest.raises(AssertionError, match="logits after"):
            assert_as_eager(delta, tokens(1, 100))
    finally:
        runtime.plan = SkipPlan.empty(runtime.sublayers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layers"),
    [("mamba2", 2), ("mamba", 2), ("falcon_h1", 2), ("kimi_linear", 3), ("qwen3_next", 3)],
)
def test_others_of_any_length(family: str, layers: int) -> None:
    """As many layers as a family's tiny configuration lists kinds of."""
    model = remembering(family, num_hidden_layers=layers)
    pair = model, build(model, None, backend="eager", static_cache=False)
    assert_as_eager(pair, tokens(1, LENGTHS[0]))
    before = pair[1].adaskip.stats().captures
    for count in LENGTHS:
        assert_as_eager(pair, tokens(1, count))
    assert pair[1].adaskip.stats().captures == before


@pytest.mark.breaks
def test_a_state_that_is_lost_between_chunks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    carry: Callable[..., Any] = delta_rule.carry_products
    monkeypatch.setattr(delta_rule, "carry_products", lambda f, t, initial: 0 * carry(f, t, None))
    module = _module(remembering("qwen3_5", layer_types=["linear_attention"] * 2))
    assert _difference(module, 64) < 1e-5 < 1e-2 < _difference(module, 130)


def _difference(module: types.ModuleType, count: int) -> float:
    """Between transformers' function and the one that is traced instead, in float32."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, count, 2, 8)
    v, g, beta = torch.randn(1, count, 4, 8), torch.rand(1, count, 4), torch.rand(1, count, 4)
    given = {"g": -0.01 * g, "beta": beta, "use_qk_l2norm_in_kernel": True}
    theirs = module.torch_chunk_gated_delta_rule(q, k, v, **given)[0]
    return float((mixers._delta_rule(q, k, v, **given)[0] - theirs).abs().max())


# What is exchanged -------------------------------------------------------------------------------


def _module(model: Any) -> types.ModuleType:
    return sys.modules[type(model).__module__]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """On whole buffers, with nothing left of the kernels of libraries."""
    lowered = list[str]()

    class Watching(WriteOutProducts):
        def __call__(self, module: torch.fx.GraphModule) -> PassResult:
            result = super().__call__(module)
            lowered.extend(operation(node) for node in module.graph.nodes)
            return result

    passes = FuseProjections(), Watching()
    monkeypatch.setattr(phase_graph, "_lowering", lambda key, _: passes if key.static_cache else ())
    model = remembering("mamba2")
    fast = build(model, None, backend="eager", static_cache=True)
    ids, ends = tokens(rows, 12), (8, 9, 10, 11, 12)
    for got, end in zip(last_logits(fast, ids, ends), ends, strict=True):
        want = model(ids[:, :end], use_cache=False).logits[:, -1:]
        assert_close(got, want, TOLERANCE, f"logits after {end} tokens")
    assert not {"conv1d", "bmm"} & set(lowered)
    assert ("project.default" in lowered) == (rows == 1), "of float32 only one row is fused"


def test_functions_are_exchanged_while_something_is_traced() -> None:
    model = remembering("mamba2")
    module = _module(model)
    before = dict(vars(module))
    with mixers.exchanged(model):
        assert module.mamba2_chunk_scan is mixers._scan_in_chunks
        now = {name for name, value in vars(module).items() if value is not before[name]}
        assert now == {"mamba2_chunk_scan"}
    assert dict(vars(module)) == before


def test_a_function_of_the_users_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = remembering("mamba2")
    own = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(_module(model), "mamba2_chunk_scan", own)
    with mixers.exchanged(model):
        assert _module(model).mamba2_chunk_scan is own


def test_what_dynamo_cannot_see_into_is_exchanged_for_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A convolution's kernel of another library, where one is installed."""
    model = remembering("mamba2")
    function = _module(model).causal_conv1d_update
    known = kernel_or_torch(function)
    assert known is not None
    assert not known.has_kernel
    cell = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    monkeypatch.setattr(cell["implementation"], "cell_contents", print)
    with mixers.exchanged(model):
        assert _module(model).causal_conv1d_update is known.written
    assert kernel_or_torch(print) is None
    assert kernel_or_torch(tokens) is None


def test_packed_rows_are_refused() -> None:
    q = torch.randn(1, 4, 2, 8)
    offsets = torch.tensor([0, 4])
    with pytest.raises(NotImplementedError, match="packed rows"):
        mixers._delta_rule(q, q, q, q[..., 0], q[..., 0], cu_seqlens=offsets)
    with pytest.raises(NotImplementedError, match="packed rows"):
        mixers._scan_in_chunks(q, q[..., 0], q[0, 0, :, 0], q, q, 64, seq_idx=offsets)
