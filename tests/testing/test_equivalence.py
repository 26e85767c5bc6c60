"""`adaskip_fx.testing`: it passes where it should, and says where it fails where it should fail."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.programs import program
from adaskip_fx.programs.structure import ModelStructure
from adaskip_fx.testing import Oracle, assert_equivalent, families, plans, prompts, tiny_configs
from adaskip_fx.testing.equivalence import compiled_for
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import Entry, entry, make_model
from tests.support.custom_decoders import OwnDecoder, OwnParallelDecoder, SharedLayer, own
from tests.support.families.all import FAMILIES, tiny_config, tiny_model

MODELS = {"pre-norm": OwnDecoder, "parallel": OwnParallelDecoder}


@functools.cache
def model_of(kind: str) -> Any:
    return own(MODELS[kind])


# A user's own model: the five lines of the documentation ----------------------------------------

pre_norm = model_of("pre-norm")
PLANS = st.deferred(lambda: plans(pre_norm))  # it is compiled for the first test, not the import


@pytest.mark.slow
@settings(max_examples=15)
@given(PLANS, prompts(pre_norm, padding=False))
def test_a_users_own_model(plan: SkipPlan, prompt: dict[str, torch.Tensor]) -> None:
    assert_equivalent(pre_norm, plan, inputs=prompt, decode_steps=3)


@settings(max_examples=10)
@given(st.data())
def test_a_users_own_parallel_model(data: st.DataObject) -> None:
    model = model_of("parallel")
    plan, prompt = data.draw(plans(model)), data.draw(prompts(model, padding=False))
    assert_equivalent(model, plan, inputs=prompt, decode_steps=3)


GROUPED = make_model("grouped")


def test_padding_is_not_compared() -> None:
    """A padded prompt runs without its padding, whose logits are others than the eager model's."""
    prompt = {
        "input_ids": torch.tensor([[30, 25], [31, 0]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    }
    assert assert_equivalent(GROUPED, inputs=prompt, decode_steps=2) < 1e-4


@settings(max_examples=6)
@given(st.data())
def test_padded_prompts(data: st.DataObject) -> None:
    plan, prompt = data.draw(plans(GROUPED, windows=True)), data.draw(prompts(GROUPED))
    assert_equivalent(GROUPED, plan, inputs=prompt, decode_steps=2)


@pytest.mark.parametrize(
    "family",
    [
        "gpt_neox",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "gemma2",
                "gpt_oss",
                "qwen3",
                "mixtral",
                "phi3",
                "cohere",
                "starcoder2",
                "olmo2",
                "jamba",
            )
        ),
    ],
)
def test_windows_of_families(family: str) -> None:
    """Fused projections, norms, parallel branches, experts, mixers, soft caps, sink scores."""
    model = tiny_model(tiny_config(family))
    heads = compiled_for(model).adaskip.kv_heads
    assert heads

    @settings(max_examples=6)
    @given(st.data())
    def property_of(data: st.DataObject) -> None:
        plan = data.draw(plans(model, windows=True))
        assert_equivalent(model, plan, inputs=data.draw(prompts(model)), decode_steps=2)

    property_of()


def test_a_window_that_is_not_there_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: the reference sees everything."""
    attention = next(iter(compiled_for(GROUPED).adaskip.kv_heads))
    windows = Windows.of({attention: Window(2, 0)})
    plan = SkipPlan.empty(compiled_for(GROUPED).adaskip.sublayers).with_windows(windows)
    assert_equivalent(GROUPED, plan, decode_steps=1)
    monkeypatch.setattr(ModelStructure, "heads", lambda *_: {})
    with pytest.raises(AssertionError, match=rf"the logits of step 0 .*{attention}"):
        assert_equivalent(GROUPED, plan, decode_steps=1)


@pytest.mark.parametrize("kind", MODELS)
def test_names_of_a_users_own_are_found(kind: str) -> None:
    """By structure: `mixing` and `thinking` say nothing."""
    runtime = runtime_of(compiled_for(model_of(kind)))
    assert [str(s) for s in runtime.sublayers] == [
        f"{i}.{kind}" for i in range(3) for kind in ("attention", "ffn")
    ]


@pytest.mark.slow
def test_a_model_whose_masks_are_its_own_is_not_run_at_static_cache() -> None:
    """It would attend to what is not filled; the compiled model notices before it is used."""
    model = own()
    runtime = runtime_of(compiled_for(model))
    runtime.static_cache = True
    assert_equivalent(model, decode_steps=2)
    assert runtime.why_no_static_cache.startswith("the graph captured for decode on a static cache")
    assert "gives other logits than the model" in runtime.why_no_static_cache


# Failures ----------------------------------------------------------------------------------------


@pytest.fixture
def wrong_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect: what stands in for a skipped sublayer is scaled by twice its factor."""
    right = program.surrogate_tensors

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: 2 * factor for name, factor in right(*arguments).items()}

    monkeypatch.setattr(program, "surrogate_tensors", wrong)


@functools.cache
def broken() -> Any:
    """A model whose programs are linked with the defect, and no other test's."""
    return own()


def scaled(model: Any, prefill: str = "", decode: str = "") -> SkipPlan:
    sublayers = {str(s): s for s in compiled_for(model).adaskip.sublayers}
    skip, extra = ([sublayers[n] for n in (name,) if n] for name in (prefill, decode))
    factors = Surrogates.scale(dict.fromkeys((*skip, *extra), 0.75))
    return SkipPlan.of(tuple(sublayers.values()), skip, decode_extra=extra, surrogates=factors)


def test_the_first_difference_is_named(wrong_factors: None) -> None:
    model = broken()
    plan = scaled(model, prefill="1.ffn")
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(model, plan, decode_steps=1)
    message = str(caught.value)
    assert message.startswith(f"OwnDecoder under plan {plan.digest[:8]}: the logits of step 0 (")
    assert "prefill, 13 tokens) differ from the eager model's by" in message
    assert (
        "First difference: the residual stream after 1.ffn (blocks.1.thinking.down), step 0"
        in message
    )
    assert "(prefill, 13 tokens): relative error 1.0e+00, at [0, " in message
    assert "instead of" in message


def test_a_difference_in_a_later_step_is_found_there(wrong_factors: None) -> None:
    model = broken()
    found = r"step 1 \(decode, token 1\) differ.*after 0.ffn .*, step 1 \(decode, token 1\)"
    with pytest.raises(AssertionError, match=found):
        assert_equivalent(model, scaled(model, decode="0.ffn"), decode_steps=2)


def test_without_the_defect_there_is_no_difference() -> None:
    assert_equivalent(pre_norm, scaled(pre_norm, prefill="1.ffn"), decode_steps=1)


@pytest.mark.slow
def test_another_dtype_and_tolerance() -> None:
    model = own()
    assert assert_equivalent(model, dtype=torch.bfloat16, decode_steps=2) < 8e-2
    assert model.dtype == torch.float32
    with pytest.raises(AssertionError, match=r"allowed -1.0e\+00\. First difference: the residual"):
        assert_equivalent(model, tol=-1, decode_steps=2)


@pytest.mark.slow
def test_weights_that_were_replaced_are_compiled_again() -> None:
    model = own()
    first = compiled_for(model)
    assert compiled_for(model) is first
    weight = model.blocks[1].thinking.down.weight
    model.blocks[1].thinking.down.weight = torch.nn.Parameter(weight * 3, requires_grad=False)
    assert_equivalent(model, decode_steps=1)
    assert compiled_for(model) is not first


def test_the_model_is_left_as_it_was() -> None:
    model = own()
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    assert_equivalent(model, decode_steps=1)
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Strategies --------------------------------------------------------------------------------------


def test_a_failing_plan_shrinks_to_the_fewest_sublayers() -> None:
    smallest = find(plans(pre_norm), lambda plan: "1.ffn" in map(str, plan.skipped("decode")))
    both = {*map(str, smallest.skipped("prefill")), *map(str, smallest.skipped("decode"))}
    assert both == {"1.ffn"}
    assert not smallest.surrogates.factors
    anything = find(plans(pre_norm), lambda plan: True)
    assert not anything.prefill
    assert not anything.decode


@given(PLANS)
def test_every_plan_leaves_something_to_run(plan: SkipPlan) -> None:
    for actions in (plan.prefill, plan.decode):
        assert len(actions) < len(plan.sublayers)


@given(prompts(pre_norm, max_tokens=9, max_batch=3))
def test_prompts(prompt: dict[str, torch.Tensor]) -> None:
    ids = prompt["input_ids"]
    assert 1 <= ids.shape[0] <= 3
    assert 2 <= ids.shape[1] <= 9
    assert 0 <= ids.min() <= ids.max() < 31
    if "attention_mask" in prompt:
        mask = prompt["attention_mask"]
        assert mask.shape == ids.shape
        assert (mask[:, -1] == 1).all(), "padding is on the left"
        assert (mask.diff(dim=1) >= 0).all(), "and in one piece"
        assert (mask[-1] == 1).all()


def test_prompts_can_be_padded() -> None:
    padded = find(prompts(pre_norm), lambda prompt: not prompt.get("attention_mask", _ONE).all())
    assert padded["attention_mask"].tolist() == [[0, 1], [1, 1]]


_ONE = torch.ones(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3"])
@settings(max_examples=8)
@given(st.data())
def test_tiny_configurations_make_models(family: str, data: st.DataObject) -> None:
    model = tiny_model(data.draw(tiny_configs(family)))
    with torch.no_grad():
        assert model(input_ids=torch.arange(7).unsqueeze(0)).logits.isfinite().all()


def test_an_unknown_family() -> None:
    with pytest.raises(ValueError, match="no family 'lama'; known: deepseek_v3, gemma2, "):
        find(tiny_configs("lama"), lambda config: True)


def test_the_families_of_tiny_configurations_are_documented() -> None:
    assert set(re.findall(r"``(\w+)``", tiny_configs.__doc__ or "")) == set(families.FAMILIES)
    assert families.FAMILIES.items() <= FAMILIES.items(), "they are compared as all others"


@pytest.mark.slow
@settings(max_examples=3)
@given(st.data())
def test_a_drawn_configuration_is_equivalent(data: st.DataObject) -> None:
    model = tiny_model(data.draw(tiny_configs("llama")))
    plan = data.draw(plans(model, windows=True))
    assert_equivalent(model, plan, inputs=data.draw(prompts(model)), decode_steps=2)


# The reference itself ----------------------------------------------------------------------------


@given(st.data())
def test_the_two_references_agree(data: st.DataObject) -> None:
    """The one that writes a Llama layer out, and the one that watches modules of any model."""
    bank: Entry = entry("three_layers")
    plan = data.draw(plans(bank.sublayers))
    watched = Oracle(bank.model, _llama_modules(3))
    ids = bank.tokens(1, 8)
    for phase in ("prefill", "decode"):
        actions = {s: plan.action(phase, s).value for s in plan.sublayers}
        skips = {str(s): plan.surrogates.factor(s) for s, a in actions.items() if a != "run"}
        setattr(watched, phase, skips)
    theirs, mine = bank.reference_cache(), bank.reference_cache()
    with bank.using(plan), watched.watching(), torch.no_grad():
        for begin, end in ((0, 6), (6, 7), (7, 8)):
            expected = bank.oracle.step(ids[:, begin:end], theirs)
            got = bank.model(input_ids=ids[:, begin:end], past_key_values=mine).logits
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_references_differ_where_their_plans_do() -> None:
    """The companion."""
    bank = entry("three_layers")
    ids = bank.tokens(1, 8)
    watched = Oracle(bank.model, _llama_modules(3), prefill={"1.ffn": None})
    with bank.using(), watched.watching(), torch.no_grad():
        got = bank.model(input_ids=ids).logits
        assert not torch.allclose(got, bank.oracle.step(ids, bank.reference_cache()), rtol=1e-3)
    plain = Oracle(bank.model, _llama_modules(3))
    with bank.using(), plain.watching(), torch.no_grad():
        expected = bank.oracle.step(ids, bank.reference_cache())
        assert torch.equal(bank.model(input_ids=ids).logits, expected)
    assert list(plain.streams) == list(_llama_modules(3))


def _llama_modules(layers: int) -> dict[str, str]:
    return {
        name: path
        for i in range(layers)
        for name, path in (
            (f"{i}.attention", f"model.layers.{i}.self_attn"),
            (f"{i}.ffn", f"model.layers.{i}.mlp"),
        )
    }


def test_refusals_are_the_compilers() -> None:
    with pytest.raises(UnsupportedError, match="two attention sublayers"):
        assert_equivalent(own(SharedLayer), decode_steps=1)


def test_every_family_is_known_to_the_newest_transformers() -> None:
    from tests.model_support.matrix import versions

    if versions().endswith(("5.23", "5.24")):
        assert all(family.known for family in FAMILIES.values())
