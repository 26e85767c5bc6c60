"""Attention that reads a latent cache: its operators, and the pass that calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan
from adaskip_fx.plans.windows import Window, Windows
from adaskip_passes.decode.absorb_latent import AbsorbLatent
from adaskip_passes.decode.fuse_attention import FuseAttention
from adaskip_passes.decode.latent_ops import attend_latent, store_and_attend_latent
from adaskip_passes.decode.ops import EVERY
from tests.passes.decode.test_fuse_projections import Record
from tests.support import attention_oracle as oracle
from tests.support import latent_oracle
from tests.support.eager_reference import assert_close, relative_error
from tests.support.families.all import tiny_config, tiny_model

ATTEND = torch.ops.adaskip.attend.default
LATENT = torch.ops.adaskip.attend_latent.default
STORE = torch.ops.adaskip.store.default
#: Heads, and numbers of a latent, of a head's own key, of the rotated key and of a value.
HEADS, RANK, OWN, TURNED, VALUE = 3, 12, 6, 4, 5


# The operators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", latent_oracle.LATENT_CASES)
def test_keys_are_latents_and_the_rest(name: str) -> None:
    case = latent_oracle.latent(1, name)
    got = attend_latent(*latent_oracle.latent_arguments(case))
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5


@pytest.mark.parametrize("name", latent_oracle.LATENT_CASES)
def test_own_tokens_are_stored_and_seen(name: str) -> None:
    case = latent_oracle.latent(2, name)
    step = oracle.step(case, rotary=False)
    arguments: Any = latent_oracle.latent_step_arguments(step)
    got = store_and_attend_latent(*arguments)
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5
    stored = torch.cat(arguments[1:3], -1).nan_to_num()
    assert torch.equal(stored, case.keys.nan_to_num())


#: Whether neighbours are pairs, and whether they are put into halves then.
KINDS = ((False, False), (True, False), (True, True))


@pytest.mark.parametrize("name", ["ragged", "several queries"])
@pytest.mark.parametrize("angles", ["numbers", "pairs", "complex"])
@pytest.mark.parametrize("kind", KINDS)
def test_rests_are_rotated(kind: tuple[bool, bool], angles: str, name: str) -> None:
    case = latent_oracle.latent(2, name)
    step = oracle.step(case, rotary=False)
    arguments: Any = latent_oracle.rotating_step_arguments(step, angles, name == "ragged", *kind)
    got = store_and_attend_latent(*arguments)
    assert relative_error(got.double(), oracle.expected(case)) < 1e-5
    stored = torch.cat(arguments[1:3], -1).nan_to_num()
    assert relative_error(stored, case.keys.nan_to_num()) < 1e-5
    for other in set(KINDS) - {kind}:
        wrong = store_and_attend_latent(*arguments[:-2], *other)
        assert relative_error(wrong.double(), oracle.expected(case)) > 1e-2


@pytest.mark.breaks
def test_the_rest_of_the_keys_matters() -> None:
    """The companion."""
    case = latent_oracle.latent(1, "ragged")
    query, latents, rotated, *rest = latent_oracle.latent_arguments(case)
    wrong: Any = attend_latent(query, latents, rotated.flip(-1), *rest)
    assert relative_error(wrong.double(), oracle.expected(case)) > 1e-2


def test_they_are_proper_operators() -> None:
    case = latent_oracle.latent(1, "ragged")
    torch.library.opcheck(LATENT, latent_oracle.latent_arguments(case))
    step = latent_oracle.latent_step_arguments(oracle.step(case, rotary=False))
    torch.library.opcheck(torch.ops.adaskip.store_and_attend_latent.default, step)
    step = latent_oracle.rotating_step_arguments(
        oracle.step(case, rotary=False), "complex", True, True, True
    )
    torch.library.opcheck(torch.ops.adaskip.store_and_attend_latent.default, step)


# The pass ---------------------------------------------------------------------------------------

#: own and turned queries, weight, latents, rotated keys, bounds
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(rows: int = 2, tokens: int = 3, heads: int = HEADS) -> Inputs:
    torch.manual_seed(rows + tokens)
    bounds = torch.tensor([[[[1, 0, EVERY, 6, 0]]], [[[0, 0, 4, 6, 0]]]])[:rows]
    return (
        torch.randn(rows, heads, tokens, OWN),
        torch.randn(rows, heads, tokens, TURNED),
        torch.randn(heads * (OWN + VALUE), RANK),
        torch.randn(rows, 1, 12, RANK),
        torch.randn(rows, 1, 12, TURNED),
        bounds,
    )


def expanded(latents: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    made = torch.nn.functional.linear(latents, weight, bias)
    whole = made.view(latents.shape[0], 12, -1, OWN + VALUE).transpose(1, 2)
    own, values = torch.functional.split(whole, [OWN, VALUE], dim=-1)
    return own, values


def written(q: Tensor, turned: Tensor, w: Tensor, latents: Tensor, rest: Tensor, b: Tensor) -> Any:
    """As transformers has it."""
    own, values = expanded(latents, w)
    shared = rest.expand(-1, HEADS, -1, -1)
    keys = latents.new_empty(latents.shape[0], HEADS, 12, OWN + TURNED)
    keys[..., :OWN].copy_(own)
    keys[..., OWN:].copy_(shared)
    return ATTEND(torch.cat((q, turned), dim=-1), keys, values, b, 0.5, 0.0, None)


def together(q: Tensor, turned: Tensor, w: Tensor, latents: Tensor, rest: Tensor, b: Tensor) -> Any:
    own, values = expanded(latents, w)
    keys = torch.cat((own, rest.expand(-1, HEADS, -1, -1)), dim=-1)
    return ATTEND(torch.cat((q, turned), -1) * 2, keys, values, b, 0.5, 3.0, None)


def other_order(
    q: Tensor, turned: Tensor, w: Tensor, latents: Tensor, rest: Tensor, b: Tensor
) -> Any:
    own, values = expanded(latents, w)
    keys = latents.new_empty(latents.shape[0], HEADS, 12, OWN + TURNED)
    keys[..., TURNED:].copy_(own)
    keys[..., :TURNED].copy_(rest.expand(-1, HEADS, -1, -1))
    return ATTEND(torch.cat((q, turned), -1), keys, values, b, 0.5, 0.0, None)


def read_besides(
    q: Tensor, turned: Tensor, w: Tensor, latents: Tensor, rest: Tensor, b: Tensor
) -> Any:
    own, values = expanded(latents, w)
    keys = torch.cat((own, rest.expand(-1, HEADS, -1, -1)), dim=-1)
    mixed = ATTEND(torch.cat((q, turned), -1), keys, values, b, 0.5, 0.0, None)
    return mixed + values.sum()


def with_bias(
    q: Tensor, turned: Tensor, w: Tensor, latents: Tensor, rest: Tensor, b: Tensor
) -> Any:
    own, values = expanded(latents, w, w[:, 0])
    keys = torch.cat((own, rest.expand(-1, HEADS, -1, -1)), dim=-1)
    return ATTEND(torch.cat((q, turned), -1), keys, values, b, 0.5, 0.0, None)


def weight_is_written(
    q: Tensor, turned: Tensor, w: Tensor, latents: Tensor, rest: Tensor, b: Tensor
) -> Any:
    own, values = expanded(latents, w)
    keys = torch.cat((own, rest.expand(-1, HEADS, -1, -1)), dim=-1)
    w.zero_()
    return ATTEND(torch.cat((q, turned), -1), keys, values, b, 0.5, 0.0, None)


def both(function: Callable[..., Any], given: Inputs) -> tuple[fx.GraphModule, float]:
    """The graph after the pass, and how far its result is from the function's in float64."""
    module = fx.symbolic_trace(function)
    Record(module).run(*[t.clone() for t in given])
    AbsorbLatent()(module)
    module.graph.lint()
    module.recompile()
    wide = [t.double() if t.is_floating_point() else t.clone() for t in given]
    return module, relative_error(module(*[t.clone() for t in given]).double(), function(*wide))


def reads_latents(module: fx.GraphModule) -> bool:
    return len(module.graph.find_nodes(op="call_function", target=LATENT)) == 1


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([written, together]), st.integers(1, 2), st.integers(1, 4))
def test_latents_are_read_instead_of_keys(
    function: Callable[..., Any], rows: int, tokens: int
) -> None:
    module, error = both(function, inputs(rows, tokens))
    assert reads_latents(module)
    assert not any(n.target is torch.nn.functional.linear for n in module.graph.nodes)
    assert error < 1e-5


@pytest.mark.parametrize("function", [other_order, read_besides, with_bias, weight_is_written])
def test_what_is_made_otherwise_stays(function: Callable[..., Any]) -> None:
    module, error = both(function, inputs())
    assert not reads_latents(module)
    assert error < 1e-5


def test_stores_become_part_of_it() -> None:
    def step(
        q: Tensor, latents: Tensor, rest: Tensor, c: Tensor, r: Tensor, p: Tensor, b: Tensor
    ) -> Any:
        STORE(latents, c, p)
        STORE(rest, r, p)
        return LATENT(q, latents, rest, b, 0.5, 0.0, None)

    module = fx.symbolic_trace(step)
    assert FuseAttention()(module).changes == 1
    module.recompile()
    latents, rest, bounds = inputs()[3:]
    query = torch.randn(2, HEADS, 3, RANK + TURNED)
    new = torch.randn(2, 1, 3, RANK), torch.randn(2, 1, 3, TURNED)
    one, two = ((latents.clone(), rest.clone()) for _ in range(2))
    position = torch.tensor([5, 5])
    got = module(query, *one, *new, position, bounds)
    assert torch.equal(got, step(query, *two, *new, position, bounds))
    assert all(map(torch.equal, one, two))


# Models -----------------------------------------------------------------------------------------


def build_latent(family: str) -> tuple[Any, Any, Any]:
    """A model of two layers, compiled for steps on a static cache, and its runtime."""
    model = tiny_model(tiny_config(family, num_hidden_layers=2))
    compiled = build(model, None, backend="eager", static_cache=True)
    return model, compiled, runtime_of(compiled)


def follow(family: str, steps: tuple[int, ...]) -> None:
    """A request in steps against the eager model; whole buffers are never read."""
    model, compiled, runtime = build_latent(family)
    ids = torch.randint(0, 61, (2, sum(steps)), generator=torch.Generator().manual_seed(0))
    cache, at = runtime.new_cache(), 0
    with torch.no_grad():
        expected = model(ids).logits
        for count in steps:
            logits = compiled(ids[:, at : at + count], past_key_values=cache).logits
            at += count
            assert_close(logits, expected[:, at - count : at], 1e-4, f"to {at}")
    assert runtime.runner.static.why_not is None
    assert not runtime.buffer_pool.whole


def test_steps_of_a_model_read_latents() -> None:
    follow("deepseek_v3", (5, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_steps_of_several_tokens_read_latents(family: str) -> None:
    follow(family, (5, 1, 1, 4, 1, 1))


@pytest.mark.slow
def test_windows_are_of_whole_layers() -> None:
    model, compiled, runtime = build_latent("deepseek_v3")
    sublayers = runtime.graphs.structure.sublayers
    attention = [s for s in sublayers if s.kind == "attention"]
    plan = SkipPlan.empty(sublayers)
    every = Windows({}, dict.fromkeys(attention, Window(64, 0)))
    ids = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = runtime.new_cache(plan=plan.with_windows(every))
        compiled(ids[:, :11], past_key_values=cache)
        logits = compiled(ids[:, 11:], past_key_values=cache).logits
        assert_close(logits, model(ids).logits[:, 11:], 1e-4, "a window as wide as the text")
    some = Windows({}, {attention[0]: Window(4, 0, (1,))})
    with pytest.raises(PlanError, match="are made of one latent, which a step reads for all"):
        runtime.new_cache(plan=plan.with_windows(some))
