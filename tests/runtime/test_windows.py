"""Attention that sees windows, against an eager model with a mask for every pair of tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_utils import AttentionInterface

from adaskip_fx import SkipPlan
from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.phase_split import decode_only
from adaskip_fx.plans.skip_plan import PlanError
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.programs import program
from adaskip_fx.runtime.checking import CheckError
from adaskip_fx.testing import assert_equivalent
from adaskip_fx.testing.equivalence import compiled_for
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import fewer, make_model
from tests.support.eager_reference import assert_close
from tests.support.eager_windows import Seen, WindowedEager
from tests.support.families.all import tiny_config, tiny_model

SHAPE: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61},
    "max_position_embeddings": 256,
}
OWN = 6  # the sliding window of the Mistral


@dataclass(frozen=True)
class Case:
    model: Any
    compiled: Any
    eager: WindowedEager

    @property
    def attention(self) -> list[Any]:
        return [s for s in self.compiled.adaskip.sublayers if s.kind == "attention"]


@functools.cache
def case(name: str, static: bool) -> Case:
    torch.manual_seed(1)
    if name == "mistral":
        model: Any = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=OWN))
    else:
        model = make_model("grouped")
    model.eval().set_attn_implementation("sdpa")
    compiled = build(model, None, backend="eager", static_cache=static)
    return Case(model, compiled, WindowedEager(model))


def plan_of(found: Case, prefill: Mapping[int, Window], decode: Mapping[int, Window]) -> SkipPlan:
    windows = Windows(*({found.attention[n]: w for n, w in by.items()} for by in (prefill, decode)))
    return SkipPlan.empty(found.compiled.adaskip.sublayers).with_windows(windows)


def seen(windows: Mapping[int, Window]) -> dict[int, Seen]:
    return {n: (w.sinks, w.tokens, w.full_heads) for n, w in windows.items()}


def follow(
    found: Case,
    prefill: Mapping[int, Window],
    decode: Mapping[int, Window],
    steps: Sequence[int],
    firsts: Sequence[int] = (0,),
    *,
    told: tuple[Mapping[int, Window], Mapping[int, Window]] | None = None,
    seed: int = 0,
) -> None:
    """A request in `steps` against one eager run of the whole text; a negative one takes back."""
    compiled, total, wanted = found.compiled, sum(s for s in steps if s > 0), []
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 61, (len(firsts), total), generator=generator)
    first, expected_of = torch.tensor(firsts).unsqueeze(1), told or (prefill, decode)
    cache, at, got = compiled.adaskip.new_cache(plan=plan_of(found, prefill, decode)), 0, []
    for number, count in enumerate(steps):
        if count < 0:
            cache.crop(count)
            at += count
            continue
        inputs: dict[str, Any] = {"input_ids": text[:, at : at + count]}
        if any(firsts):
            mask = (torch.arange(at + count) >= first).long()
            places = (torch.arange(at, at + count) - first).clamp_min(0)
            inputs.update(attention_mask=mask, position_ids=places)
        with torch.no_grad():
            logits = compiled(**inputs, past_key_values=cache).logits
        del wanted[at:]
        wanted += [seen(expected_of[number > 0 and count == 1])] * count
        at += count
        expected = found.eager.logits(text[:, :at], firsts, wanted)[:, -count:]
        real = torch.arange(at - count, at) >= first
        if real.any():
            assert_close(logits[real], expected[real], 1e-4, f"step {number}")
        got.append(logits)


NARROW = {0: Window(3, 2), 1: Window(5, 1, (1,))}
OTHER = {0: Window(4, 0), 1: Window(2, 3)}
#: How views see windows is in `tests/kv_cache/test_sliding.py` as well.
STATIC = st.booleans() if settings().max_examples > 20 else st.just(True)
STEPS = (11, 1, 1, 6, 1, 1, -2, 1, 3, 1, 9, 1)


@pytest.mark.parametrize("static", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_request_sees_its_windows(static: bool) -> None:
    found = case("llama", static)
    follow(found, NARROW, NARROW, STEPS)
    follow(found, NARROW, OTHER, STEPS, (0, 3, 7))
    assert runtime_of(found.compiled).static_cache == static


def test_a_wider_window_is_noticed() -> None:
    """The companion: one token more in one layer, one sink, or a head."""
    found = case("llama", True)
    for wrong in (Window(4, 2), Window(3, 3), Window(3, 2, (0,))):
        with pytest.raises(AssertionError, match="relative error"):
            follow(found, NARROW, NARROW, (12, 1), told=({**NARROW, 0: wrong}, NARROW))
    with pytest.raises(AssertionError, match=r"step [12].*relative error"):
        follow(found, NARROW, OTHER, (12, 1, 1), told=(NARROW, NARROW))


def windows() -> st.SearchStrategy[dict[int, Window]]:
    heads = st.sets(st.integers(0, 1), max_size=2).map(tuple)
    window = st.builds(Window, st.integers(1, 14), st.integers(0, 5), heads)
    return st.dictionaries(st.integers(0, 1), window, max_size=2)


@fewer(4)
@given(
    prefill=windows(),
    decode=windows(),
    steps=st.tuples(
        st.integers(1, 16), st.lists(st.one_of(st.just(1), st.integers(1, 9)), max_size=5)
    ).map(lambda drawn: (drawn[0], *drawn[1])),
    firsts=st.one_of(st.just((0,)), st.lists(st.integers(0, 9), min_size=2, max_size=3)),
    static=STATIC,
    seed=st.integers(0, 99),
)
def test_however_a_text_is_cut(
    prefill: dict[int, Window],
    decode: dict[int, Window],
    steps: tuple[int, ...],
    firsts: Sequence[int],
    static: bool,
    seed: int,
) -> None:
    follow(case("llama", static), prefill, decode, steps, firsts, seed=seed)


@pytest.mark.parametrize("static", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_with_a_window_of_its_own_sees_the_smaller(static: bool) -> None:
    found = case("mistral", static)
    narrow = {0: Window(4, 0), 1: Window(9, 0)}
    follow(found, narrow, narrow, (12, 1, 5, 1))
    with pytest.raises(UnsupportedError, match=r"0\.attention: its window has sinks, but the"):
        found.compiled.adaskip.plan = plan_of(found, {0: Window(4, 1)}, {})


def test_long_prompts_are_taken_in_blocks() -> None:
    """More queries than one block has, and a window longer than a block."""
    for window in (Window(20, 3), Window(150, 1)):
        follow(case("llama", True), {0: window}, {}, (240, 9))


@pytest.mark.parametrize("layers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_bounds_that_one_layer_alone_reads(layers: int) -> None:
    """They are made in that layer's piece; the static cache stays, for all plans."""
    kinds = ["sliding_attention"] * layers
    kinds[layers // 2] = "full_attention"
    torch.manual_seed(1)
    if layers == 1:
        model: Any = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})).eval()
    else:
        more = {"num_hidden_layers": layers, "head_dim": 8, "layer_types": kinds}
        config = Gemma3TextConfig(**{**SHAPE, **more, "sliding_window": 5})
        model = Gemma3ForCausalLM(config).eval()
    compiled = build(model, None, backend="eager", static_cache=True)
    alone = [s for s in compiled.adaskip.sublayers if s.kind == "attention"][layers // 2]
    plan = SkipPlan.empty(compiled.adaskip.sublayers)
    windowed = plan.with_windows(Windows.of({alone: Window(4, 2, (1,))}))
    reference = WindowedEager(model) if layers == 1 else None
    ids = torch.randint(0, 61, (1, 14))
    with torch.no_grad():
        for each, window in ((windowed, {0: (2, 4, (1,))}), (plan, {})):
            cache = compiled.adaskip.new_cache(plan=each)
            parts = [compiled(p, past_key_values=cache).logits for p in ids.split([10, 1, 2, 1], 1)]
            if reference is not None:
                want = reference.logits(ids, (0,), [window] * 14)  # type: ignore[list-item]
                assert_close(torch.cat(parts, 1), want, 1e-4, "logits")
    assert runtime_of(compiled).static_cache
    assert runtime_of(compiled).why_no_static_cache is None
    if reference is None:
        assert assert_equivalent(model, windowed, decode_steps=3) < 1e-4


# A plan like others -----------------------------------------------------------------------------


def test_any_windows_need_one_piece_more_in_each_phase() -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    found = Case(model, build(model, None, backend="eager", static_cache=True), None)  # type: ignore[arg-type]
    runtime, compiled = runtime_of(found.compiled), []
    plans = [({}, {}), (NARROW, NARROW), (OTHER, {1: Window(7, 2)}), ({1: Window(1, 0)}, OTHER)]
    for prefill, decode in plans:
        cache = found.compiled.adaskip.new_cache(plan=plan_of(found, prefill, decode))
        with torch.no_grad():
            for count in (5, 1):
                ids = torch.zeros(1, count, dtype=torch.int64)
                found.compiled(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        compiled.append(runtime.pieces_compiled)
    captures = runtime.counters.captures
    assert captures == 2
    assert compiled[1] == compiled[0] + 3, "attention in each phase, and the bounds"
    assert compiled[2:] == compiled[1:2] * 2


def test_windows_beside_skipped_sublayers_and_decode_alone() -> None:
    found = case("llama", True)
    sublayers = found.compiled.adaskip.sublayers
    narrow = Windows.of(found.attention[1:], Window(3, 1))
    plan = SkipPlan.of(sublayers, ["0.ffn"], windows=narrow)
    for checked in (plan, decode_only(plan)):
        assert assert_equivalent(found.model, checked, decode_steps=4) < 1e-5
    assert decode_only(plan).windows == Windows(decode=narrow.decode)


def test_checked_requests_follow_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = case("llama", True)
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    with torch.no_grad():
        ids = torch.arange(20).unsqueeze(0)
        found.compiled.adaskip.plan = plan_of(found, NARROW, OTHER)
        found.compiled.generate(ids, max_new_tokens=4, do_sample=False)
        structure = runtime_of(found.compiled).graphs.structure
        monkeypatch.setattr(structure, "heads", lambda windows: {})
        with pytest.raises(CheckError, match="differ from the eager model's"):
            found.compiled.generate(ids, max_new_tokens=4, do_sample=False)
    found.compiled.adaskip.plan = plan_of(found, {}, {})


def test_attention_that_is_written_out_is_refused_by_name() -> None:
    model = tiny_model(tiny_config("mpt"))
    compiled = build(model, None, backend="eager")
    found = Case(model, compiled, None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"layer 1's attention cannot have a window"):
        compiled.adaskip.plan = plan_of(found, {1: Window(4, 0)}, {})


def test_attention_of_a_users_own_is_refused_by_name() -> None:
    def own(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        output = torch.nn.functional.scaled_dot_product_attention(
            query=query, key=key, value=value, is_causal=True, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("mine", own)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.set_attn_implementation("mine")
    compiled = build(model, None, backend="eager")
    assert compiled.adaskip.kv_heads == {}
    found = Case(model, compiled, None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="cannot have a window: it is a function of the use"):
        compiled.adaskip.plan = plan_of(found, {1: Window(4, 0)}, {})


def test_a_plan_that_cannot_be_linked_does_not_disable_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one plan cannot do is no reason to decode without a static cache."""
    found = case("llama", True)
    with torch.no_grad(), monkeypatch.context() as patched:

        def refuse(*_: Any, **__: Any) -> None:
            raise UnsupportedError("no")

        patched.setattr(program, "rewrite", refuse)
        cache = found.compiled.adaskip.new_cache(plan=plan_of(found, {0: Window(77)}, {}))
        with pytest.raises(PlanError, match=r"plan \w+ cannot be linked: no"):
            found.compiled(torch.zeros(1, 3, dtype=torch.int64), past_key_values=cache)
    assert runtime_of(found.compiled).static_cache


def test_an_eager_model_is_checked_with_pytorchs_attention() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.set_attn_implementation("eager")
    sublayers = compiled_for(model).adaskip.sublayers
    plan = SkipPlan.empty(sublayers).with_windows(Windows.of(sublayers[:1], Window(2, 1)))
    assert assert_equivalent(model, plan, decode_steps=2) < 1e-4
    assert model.config._attn_implementation == "eager"


def test_what_is_printed_names_the_windows() -> None:
    found = case("llama", True)
    found.compiled.adaskip.plan = plan_of(found, {0: Window(3, 2)}, {})
    lines = str(found.compiled.adaskip).splitlines()
    assert any("window 2+3" in line and "attention 0" in line for line in lines)
    found.compiled.adaskip.plan = plan_of(found, {}, {})


def test_schedules_have_one_window_in_prompts() -> None:
    found = case("llama", True)
    plans = plan_of(found, {0: Window(3)}, {}), plan_of(found, {0: Window(4)}, {})
    with pytest.raises(PlanError, match="step 2: prefill has other windows than at step 0"):
        Schedule(((0, plans[0]), (2, plans[1])))


def test_a_head_that_is_not_there_is_refused() -> None:
    found = case("llama", True)
    with pytest.raises(ValueError, match=r"leaves K/V head 2 full, but there are 2, from 0 on"):
        found.compiled.adaskip.plan = plan_of(found, {1: Window(4, 0, (0, 2))}, {})
