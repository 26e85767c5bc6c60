"""Bad input: an error that says what, where and what to do, and nothing changed or lost."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

import adaskip_fx
from adaskip_fx import Profile, SkipPlan
from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import PlanError
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.profiles.profile import ProfileError
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import Entry, assert_same_cache, entry, make_model, profile_of
from tests.support.sharing import assert_unchanged, snapshot

SHAPE = "one_layer"


@pytest.fixture(scope="module")
def model() -> Any:
    """Never compiled; each test that is handed it leaves it as it was."""
    return make_model(SHAPE)


@pytest.fixture(scope="module")
def profile(model: Any) -> Profile:
    made = profile_of(entry(SHAPE), {"0.attention": 0.9, "0.ffn": 0.5})
    return Profile(made.sublayers, made.statistics, fingerprint(model), {}, {})


def refused(
    make: Callable[[], Any], error: type[Exception], message: str, model: Any = None
) -> None:
    """`make` raises `error` with a matching message, and leaves `model` alone."""
    before = snapshot(model) if model is not None else None
    with pytest.raises(error, match=message):
        make()
    if before is not None:
        assert_unchanged(model, before)


# compile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.999, 0, -1.0, math.nan, math.inf, 4.0, 100, "1.2", None, True])
def test_alpha(model: Any, profile: Profile, alpha: Any) -> None:
    """Below 1, no number, or so large that nothing would run."""
    message = r"alpha, the acceleration ratio, must be a number of at least 1 \(skip nothing\) and "
    message += r"below 4 \(which would skip all 2 sublayers\); got "
    refused(lambda: adaskip_fx.compile(model, profile, alpha), ValueError, message, model)


def test_a_profile_of_another_model(profile: Profile) -> None:
    other = make_model("grouped")
    with pytest.raises(ProfileError) as caught:
        adaskip_fx.compile(other, profile)
    message = str(caught.value)
    assert fingerprint(other).digest in message
    assert profile.fingerprint.digest in message
    assert "load the profile of this model, or calibrate it" in message


def test_a_saved_plan_of_another_model(tmp_path: Path) -> None:
    """Of the same sublayers: what tells them apart is the fingerprint of a saved plan."""
    compiled, other = entry(SHAPE).compiled, make_model(SHAPE)
    other.config.rms_norm_eps = 0.5
    compiled.adaskip.plan.save(tmp_path / "plan.json")
    found, here = fingerprint(entry(SHAPE).model), fingerprint(other)
    message = f"the plan was made for {re.escape(str(found))}, but LlamaForCausalLM is "
    path = tmp_path / "plan.json"
    refused(lambda: adaskip_fx.compile(other, plan=path, backend="eager"), PlanError, message)
    plan = SkipPlan.load(path).with_fingerprint(here)
    before = compiled.adaskip.plan
    with pytest.raises(PlanError, match=r"the plan was made for .*; load the plan of this model"):
        compiled.adaskip.plan = plan
    with pytest.raises(PlanError, match="the plan was made for"):
        compiled.adaskip.new_cache(plan=plan)
    assert compiled.adaskip.plan is before
    compiled.adaskip.new_cache(plan=SkipPlan.load(path))


def test_no_profile_and_no_plan(model: Any) -> None:
    message = "compile needs a profile, or an explicit plan"
    refused(lambda: adaskip_fx.compile(model, None), ValueError, message, model)


@pytest.mark.parametrize("damage", ["missing", "truncated", "edited", "newer"])
def test_profile_files(model: Any, profile: Profile, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "tiny.adaskip"
    if damage != "missing":
        profile.save(folder)
        document = folder / "profile.json"
        text = document.read_text()
        if damage == "truncated":
            document.write_text(text[: len(text) // 2])
        elif damage == "edited":
            document.write_text(text.replace('"parameters": ', '"parameters": 1'))
        else:
            document.write_text(text.replace('"schema": 1', '"schema": 2'))
    message = {
        "missing": "no such folder; check the path, or calibrate again",
        "truncated": "truncated or not JSON.*calibrate again",
        "edited": "edited after it was saved.*calibrate again",
        "newer": r"schema 2 is newer than this version reads \(1\); upgrade adaskip-fx",
    }[damage]
    refused(lambda: adaskip_fx.compile(model, folder), ProfileError, message, model)
    refused(lambda: adaskip_fx.compile(model, str(folder)), ProfileError, str(folder))


def test_a_crash_while_saving_leaves_the_old_profile(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    profile.save(tmp_path / "p")
    other = Profile(profile.sublayers, profile.statistics * 2, profile.fingerprint, {}, {})

    def crash(*args: Any) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk is full"):
        other.save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").digest == profile.digest


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"backend": "inductr"}, ValueError, "unknown backend 'inductr'; known: .*eager.*inductor"),
    ({"backend": print}, ValueError, "unknown backend"),
    ({"link": "fuse"}, ValueError, "link must be 'pieces' or 'fused', got 'fuse'"),
    ({"memory_budget": 0}, ValueError, "memory_budget must be a whole number of bytes, got 0"),
    ({"memory_budget": "all"}, ValueError, "memory_budget must be a whole number of bytes, got 'a"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options(
    model: Any, profile: Profile, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    refused(lambda: adaskip_fx.compile(model, profile, **options), error, message, model)


def test_a_plan_of_another_model(model: Any) -> None:
    plan = SkipPlan.of(entry("grouped").sublayers, ["0.ffn"])
    message = (
        r"the plan is for 4 sublayers \(2 attention, 2 ffn\), but LlamaForCausalLM has 2 "
        r"sublayers \(1 attention, 1 ffn\)"
    )
    refused(lambda: adaskip_fx.compile(model, None, plan=plan), PlanError, message, model)


def test_policies_are_checked_when_made() -> None:
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        adaskip_fx.AdaSkip(window=0)
    with pytest.raises(ValueError, match="unknown variant 'papers'"):
        adaskip_fx.AdaSkip(variant="papers")  # type: ignore[arg-type]


# Models -----------------------------------------------------------------------------------------


def tiny_t5() -> Any:
    shape = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, num_heads=2))


def tiny_bert() -> Any:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    return transformers.BertConfig(**shape, num_hidden_layers=2, num_attention_heads=2)


class CountingMLP(GPTNeoXMLP):  # type: ignore[misc]
    """An FFN with a state, so that it cannot be moved behind attention."""

    seen: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> Any:
        if torch.compiler.is_compiling():
            self.seen.add_(hidden_states.sum())
        return super().forward(hidden_states)


def tiny_neox() -> Any:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.GPTNeoXConfig(
        **shape, num_attention_heads=2, max_position_embeddings=64, use_parallel_residual=True
    )
    model = transformers.GPTNeoXForCausalLM(config)
    mlp = model.gpt_neox.layers[0].mlp
    mlp.__class__ = CountingMLP
    mlp.register_buffer("seen", torch.zeros(()))
    return model


def tiny_minimax() -> Any:
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    more = {"num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MiniMaxConfig(**shape, **more, layer_types=["linear_attention"])
    return transformers.MiniMaxForCausalLM(config)


class Wrapped(nn.Module):
    """As torch.compile wraps a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        setattr(self, name, model)


def mixed(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return peft.get_peft_model(make_model(SHAPE), config, mixed=True)


class NotResidual(transformers.LlamaForCausalLM):
    """Its layers hand on what their branch computed, without the stream."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.__class__ = _NoSum


class _NoSum(transformers.models.llama.modeling_llama.LlamaDecoderLayer):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        mixed = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden: torch.Tensor = self.mlp(self.post_attention_layernorm(mixed))
        return hidden


MODELS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a module": (
        lambda m: m.lm_head,
        TypeError,
        "expected a transformers PreTrainedModel with a language-model head, got Linear$",
    ),
    "a string": (lambda m: "SmolLM2", TypeError, "expected a transformers .*, got str"),
    "compiled by torch": (
        lambda m: Wrapped(m, "_orig_mod"),
        TypeError,
        r"a torch.compile wrapper: pass the model inside it",
    ),
    "adapters of several kinds": (
        lambda m: mixed(m),
        TypeError,
        r"got PeftMixedModel \(adapters of several kinds: pass the decoder inside, base_model",
    ),
    "no head": (
        lambda m: m.model,
        TypeError,
        "LlamaModel has no language-model head, nor another; load it with AutoModelForCausalLM",
    ),
    "an encoder's classifier": (
        lambda m: transformers.BertForSequenceClassification(tiny_bert()),
        TypeError,
        "BertForSequenceClassification is an encoder: its tokens see those after them",
    ),
    "encoder-decoder": (
        lambda m: tiny_t5(),
        TypeError,
        "T5ForConditionalGeneration is an encoder-decoder model; only decoder-only",
    ),
    "parallel": (
        lambda m: tiny_neox(),
        UnsupportedError,
        "gpt_neox.layers.0.mlp: its name says ffn, but it writes to a cache",
    ),
    "a cache of its own": (
        lambda m: tiny_minimax(),
        UnsupportedError,
        "MiniMaxForCausalLM does not run on a DynamicCache, so its memory is not known: ValueError",
    ),
    "no residual": (
        lambda m: NotResidual(m.config),
        UnsupportedError,
        r"no residual stream found.*Only decoders made of x \+ f\(x\) sublayers",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of what peft calls
@pytest.mark.parametrize("case", MODELS)
def test_models(model: Any, case: str) -> None:
    make, error, message = MODELS[case]
    bad = make(model)
    if isinstance(bad, nn.Module):
        bad.eval()
    watched = bad if isinstance(bad, transformers.PreTrainedModel) else None
    refused(lambda: build(bad, None, backend="eager"), error, message, watched)


def test_training_mode() -> None:
    model = make_model(SHAPE).train()
    message = r"the model is in training mode; call model.eval\(\) first"
    refused(lambda: build(model, None), ValueError, message, model)
    assert model.training


def test_compiled_twice() -> None:
    compiled = entry(SHAPE).compiled
    message = "this model is compiled already; compile the original with another plan"
    refused(lambda: build(compiled, None), TypeError, message)


def test_a_forward_replaced_on_the_instance() -> None:
    """As accelerate does; the hook would be called by one of the two models only."""
    model = make_model(SHAPE)
    model.forward = functools.partial(type(model).forward, model)
    refused(lambda: build(model, None), TypeError, "forward was replaced on the instance.*device_")


# Forward ----------------------------------------------------------------------------------------

IDS = torch.arange(1, 6).unsqueeze(0)


def static_cache() -> Any:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    return transformers.StaticCache(config=config, max_cache_len=8)


CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "labels that are no tensor": (
        {"labels": IDS.tolist()},
        TypeError,
        r"labels must be a tensor \[batch, tokens\], not a list",
    ),
    "labels of other tokens": (
        {"labels": IDS, "logits_to_keep": 1},
        ValueError,
        r"Expected input batch_size \(1\) to match target batch_size \(5\)",
    ),
    "an argument that no loss has": (
        {"labels": IDS, "label_smoothing": 0.1},
        NotImplementedError,
        r"forward\(label_smoothing=...\)",
    ),
    "some hidden states": (
        {"output_hidden_states": [0, 2]},
        NotImplementedError,
        r"forward\(output_hidden_states=...\) is not supported by adaskip_fx yet; call the orig",
    ),
    "attentions": ({"output_attentions": True}, NotImplementedError, "output_attentions"),
    "embeddings and ids": (
        {"inputs_embeds": torch.zeros(1, 5, 16)},
        ValueError,
        "give input_ids or inputs_embeds, not both",
    ),
    "embeddings without an axis": (
        {"input_ids": None, "inputs_embeds": torch.zeros(3, 16)},
        ValueError,
        r"inputs_embeds must be a tensor \[batch, tokens, hidden\]",
    ),
    "no embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 0, 16)},
        ValueError,
        r"inputs_embeds is empty: \[1, 0, 16\]",
    ),
    "embeddings elsewhere": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 16, device="meta")},
        ValueError,
        "inputs_embeds is on meta, the model on cpu",
    ),
    "embeddings of another width": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 15)},
        ValueError,
        r"inputs_embeds are 15 wide and torch.float32, the model's embeddings 16 wide and",
    ),
    "embeddings of another dtype": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 16, dtype=torch.float64)},
        ValueError,
        "inputs_embeds are 16 wide and torch.float64, the model's embeddings",
    ),
    "unknown argument": ({"temprature": 3}, NotImplementedError, r"forward\(temprature=...\)"),
    "no tokens": ({"input_ids": None}, ValueError, r"input_ids must be a tensor \[batch, tokens\]"),
    "one dimension": ({"input_ids": IDS[0]}, ValueError, r"must be a tensor \[batch, tokens\]"),
    "a list": ({"input_ids": IDS.tolist()}, ValueError, r"must be a tensor \[batch, tokens\]"),
    "empty": ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids is empty: \[1, 0\]"),
    "no rows": ({"input_ids": IDS[:0]}, ValueError, r"input_ids is empty: \[0, 5\]"),
    "elsewhere": ({"input_ids": IDS.to("meta")}, ValueError, "is on meta, the model on cpu"),
    "prepared mask": (
        {"attention_mask": torch.ones(1, 1, 5, 5)},
        NotImplementedError,
        "prepared 4D masks are not supported",
    ),
    "masks by layer type": ({"attention_mask": {}}, NotImplementedError, "must be a tensor"),
    "short mask": (
        {"attention_mask": torch.ones(1, 4)},
        ValueError,
        r"attention_mask has shape \[1, 4\], expected \[1, 5\]: 0 stored and 5 new tokens",
    ),
    "mask of other rows": (
        {"attention_mask": torch.ones(2, 5)},
        ValueError,
        r"attention_mask has shape \[2, 5\], expected \[1, 5\]",
    ),
    "indices to keep by row": (
        {"logits_to_keep": torch.tensor([[1]])},
        NotImplementedError,
        r"logits_to_keep must be an integer, indices \[kept\] or a bool mask \[tokens\], not "
        r"int64 \[1, 1\]; call the original model",
    ),
    "no index to keep": (
        {"logits_to_keep": torch.tensor([1.0])},
        NotImplementedError,
        r"logits_to_keep must be an integer, .*, not float32 \[1\]",
    ),
    "an index too far": (
        {"logits_to_keep": torch.tensor([-1, 5])},
        IndexError,
        r"logits_to_keep names a token beyond the 5 new one\(s\): \[-1, 5\]",
    ),
    "an index too far back": (
        {"logits_to_keep": torch.tensor([-6])},
        IndexError,
        r"logits_to_keep names a token beyond the 5 new one\(s\): \[-6\]",
    ),
    "a mask of what to keep, too short": (
        {"logits_to_keep": torch.ones(4, dtype=torch.bool)},
        IndexError,
        r"logits_to_keep is a mask of 4 token\(s\), but 5 are new",
    ),
    "positions": (
        {"position_ids": torch.arange(4).unsqueeze(0)},
        ValueError,
        r"position_ids has shape \[1, 4\]",
    ),
    "a foreign cache": (
        {"past_key_values": static_cache()},
        TypeError,
        "past_key_values is a StaticCache; a compiled model needs its own cache, or a DynamicCach",
    ),
    "a tuple": ({"past_key_values": ()}, TypeError, "past_key_values is a tuple"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    given, error, message = CALLS[case]
    bank = entry(SHAPE)
    with torch.no_grad():
        refused(
            lambda: bank.compiled(**{"input_ids": IDS, "logits_to_keep": 1, **given}),
            error,
            message,
            bank.model,
        )


def test_a_good_call_is_not_refused() -> None:
    """The companion: what the cases above begin from, and arguments that ask for nothing."""
    with torch.no_grad():
        entry(SHAPE).compiled(
            input_ids=IDS,
            logits_to_keep=1,
            labels=None,
            output_hidden_states=False,
            attention_mask=torch.ones(1, 5),
            position_ids=torch.arange(5).unsqueeze(0),
        )


def test_training_mode_of_the_compiled_model() -> None:
    compiled = entry(SHAPE).compiled
    compiled.train()
    try:
        with torch.no_grad():
            refused(lambda: compiled(IDS), RuntimeError, r"for inference only; call eval\(\) on it")
    finally:
        compiled.eval()


# A cache that is in use -------------------------------------------------------------------------


def begun(bank: Entry) -> tuple[Any, Any]:
    cache, reference = bank.runtime.new_cache(), bank.reference_cache()
    with torch.no_grad():
        bank.compiled(IDS, past_key_values=cache, logits_to_keep=1)
    bank.oracle.step(IDS, reference)
    return cache, reference


IN_USE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another batch": (
        {"input_ids": torch.ones(2, 1, dtype=torch.int64)},
        ValueError,
        "past_key_values holds a batch of 1, the new input has 2 rows",
    ),
    "a mask of the new tokens only": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 5)},
        ValueError,
        r"shape \[1, 5\], expected \[1, 10\]: 5 stored and 5 new tokens",
    ),
    "an impossible token": ({"input_ids": torch.tensor([[10**6, 1]])}, IndexError, "out of range"),
}


@pytest.mark.parametrize("case", IN_USE)
def test_a_refused_step_leaves_the_cache(case: str) -> None:
    given, error, message = IN_USE[case]
    bank = entry(SHAPE)
    with bank.using():
        cache, reference = begun(bank)
        plan, request = bank.plan(), cache.request
        with torch.no_grad():
            refused(
                lambda: bank.compiled(**given, past_key_values=cache, logits_to_keep=1),
                error,
                message,
            )
        assert cache.request is request
        assert_same_cache(bank, plan, cache, reference)
        token = IDS[:, :1]
        with torch.no_grad():
            logits = bank.compiled(token, past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(logits, bank.oracle.step(token, reference))


def test_a_cache_of_another_compiled_model() -> None:
    bank, other = entry(SHAPE), entry("equal_heads")
    cache, reference = begun(other)
    message = "past_key_values was made by another compiled model, whose plan stores other layers"
    with torch.no_grad():
        refused(lambda: bank.compiled(IDS, past_key_values=cache), ValueError, message)
    refused(
        lambda: bank.compiled.generate(IDS, past_key_values=cache, max_new_tokens=2),
        ValueError,
        message,
    )
    assert_same_cache(other, other.plan(), cache, reference)


# generate ---------------------------------------------------------------------------------------

GENERATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "quantized cache": (
        {"cache_implementation": "quantized"},
        NotImplementedError,
        "cache_implementation='quantized'",
    ),
    "a foreign cache": (
        {"past_key_values": static_cache()},
        TypeError,
        "past_key_values is a StaticCache",
    ),
    "attentions": (
        {"output_attentions": True, "return_dict_in_generate": True},
        (NotImplementedError, ValueError),
        r"output_attentions",
    ),
    "embeddings": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 15)},
        ValueError,
        "inputs_embeds are 15 wide",
    ),
}


@pytest.mark.parametrize("case", GENERATES)
def test_generate(case: str) -> None:
    given, error, message = GENERATES[case]
    bank = entry(SHAPE)
    refused(
        lambda: bank.compiled.generate(**{"input_ids": IDS, "max_new_tokens": 3, **given}),
        error,
        message,
        bank.model,
    )
    bank.compiled.generate(IDS, max_new_tokens=3, do_sample=False)  # and it still works


def test_a_compiled_models_cache_in_the_original() -> None:
    bank = entry(SHAPE)
    with bank.using():
        cache, reference = begun(bank)
        message = "this cache belongs to a compiled model"
        with torch.no_grad():
            refused(lambda: bank.model(IDS, past_key_values=cache), NotImplementedError, message)
        assert_same_cache(bank, bank.plan(), cache, reference)


# What cannot be done to a compiled model --------------------------------------------------------

MOVES: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "device": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("case", MOVES)
def test_moving(case: str) -> None:
    bank = entry(SHAPE)
    message = "shares its parameters .* cannot be moved .*; move the original and compile it again"
    refused(lambda: MOVES[case](bank.compiled), RuntimeError, message, bank.model)
    assert bank.compiled.dtype == torch.float32


def test_copying_and_pickling(tmp_path: Path) -> None:
    bank = entry(SHAPE)
    pickled = "a compiled model cannot be pickled; save the original model and the profile"
    refused(
        lambda: copy.deepcopy(bank.compiled),
        TypeError,
        "a compiled model cannot be copied; compile the original again",
        bank.model,
    )
    refused(lambda: pickle.dumps(bank.compiled), TypeError, pickled)
    refused(lambda: torch.save(bank.compiled, tmp_path / "m.pt"), TypeError, pickled)


def test_inductor_on_cpu_without_a_compiler(
    model: Any, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaskip_fx.utils import torch_internals

    monkeypatch.setattr(torch_internals, "find_cpp_compiler", lambda: None)
    message = r'needs a C\+\+ compiler on CPU and none was found.*pass backend="eager"'
    refused(
        lambda: adaskip_fx.compile(model, profile, backend="inductor"), RuntimeError, message, model
    )
    assert adaskip_fx.compile(model, profile, backend="aot_eager").adaskip.plan
