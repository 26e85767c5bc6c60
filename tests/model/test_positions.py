"""Positions beyond what a config says, and frequencies that switch: the eager model's logits.

The eager model is a fresh copy for every comparison: transformers keeps the frequencies of dynamic
NTK from call to call.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import sys
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from adaskip_fx.api import build
from adaskip_fx.capture import rotary
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.runtime import turns
from adaskip_fx.runtime.static_inputs import StaticInputs
from adaskip_passes import UnsupportedError
from tests.support.custom_decoders import OwnDecoder, own
from tests.support.eager_reference import assert_close, cache_name

TRAINED = 64
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ROPES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "default": {"rope_type": "default"},
        "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "longrope": {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 32,
        },
    }
)
#: Where frequencies change.
SWITCH = {"dynamic": TRAINED, "longrope": 32}


def make(rope: str) -> Any:
    torch.manual_seed(0)
    parameters = {**ROPES[rope], "rope_theta": 10_000.0}
    given = {**SHAPE, "max_position_embeddings": TRAINED, "rope_parameters": parameters}
    if rope != "longrope":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))
    else:
        more = {"original_max_position_embeddings": 32, "sliding_window": None}
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**given, **more))
    return model.eval().requires_grad_(False)


def ids_of(tokens: int, rows: int = 1) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(tokens)
    return torch.randint(3, 61, (rows, tokens), generator=drawn)


class Pair:
    """A model and the same compiled; `fresh` copies of the first have run nothing."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self._first = model, copy.deepcopy(model)
        self.compiled: Any = build(model, None, backend="eager", **options)

    def fresh(self) -> Any:
        return copy.deepcopy(self._first)

    @torch.no_grad()
    def steps(self, model: Any, ids: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
        """Logits of a text in steps that end at `cuts`, on one cache."""
        past: Any = None
        name, logits, begin = cache_name(self.model.forward), [], 0
        for end in cuts:
            output = model(ids[:, begin:end], **{name: past}, use_cache=True)
            past, begin = output[name], end
            logits.append(output.logits)
        return logits

    def check(self, ids: torch.Tensor, cuts: list[int] | None = None) -> None:
        """Compare a text in steps; AssertionError on a difference."""
        given = ids, cuts or [ids.shape[1]]
        got, want = self.steps(self.compiled, *given), self.steps(self.fresh(), *given)
        for end, one, other in zip(given[1], got, want, strict=True):
            assert_close(one, other, 1e-5, f"logits up to {end}")


@functools.cache
def pair_of(rope: str) -> Pair:
    return Pair(make(rope))


@pytest.fixture(
    params=[r if r in SWITCH else pytest.param(r, marks=pytest.mark.slow) for r in ROPES]
)
def rope(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pair(rope: str) -> Pair:
    return pair_of(rope)


def test_texts_of_all_lengths(pair: Pair) -> None:
    """A short one after long ones as well."""
    for tokens in (32, 33, TRAINED + 1, 3 * TRAINED, 20):
        pair.check(ids_of(tokens))


def test_generate_across_the_end(pair: Pair, rope: str) -> None:
    """At its switch Phi-3 has the whole text run again."""
    options = {"max_new_tokens": 12, "do_sample": False}
    ids = ids_of(SWITCH.get(rope, TRAINED) - 6)
    got, want = (m.generate(ids, **options) for m in (pair.compiled, pair.fresh()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("rope", SWITCH)
def test_padded_rows_have_the_frequencies_of_the_longest(rope: str) -> None:
    pair, tokens = pair_of(rope), SWITCH[rope] + 6
    ids, mask = ids_of(tokens, 2), torch.ones(2, tokens, dtype=torch.int64)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        got, want = (m(**given).logits for m in (pair.compiled, pair.fresh()))
    assert_close(got[mask.bool()], want[mask.bool()], 1e-5, "logits")


def test_neither_model_sees_what_the_other_has_run(pair: Pair) -> None:
    held = {k: v.clone() for k, v in pair.model.named_buffers()}
    long, short = ids_of(3 * TRAINED), ids_of(20)
    name = cache_name(pair.model.forward)
    with torch.no_grad():
        pair.compiled(long)
        assert all(torch.equal(v, held[k]) for k, v in pair.model.named_buffers())
        cache = pair.compiled(short)[name]
        pair.model(long)  # its module may have other frequencies now
        pair.check(short)
        pair.compiled(short, **{name: cache})  # a request that goes on is not refused


@pytest.mark.parametrize(("rope", "static"), [("longrope", False), ("dynamic", True)], ids=str)
def test_a_request_across_the_switch(rope: str, static: bool) -> None:
    """By single tokens, and by several that are fewer than a static step has."""
    pair, switch = Pair(make(rope), static_cache=True) if static else pair_of(rope), SWITCH[rope]
    ids = ids_of(switch + 6)
    pair.check(ids, [switch - 3, *range(switch - 2, switch + 4)])
    pair.check(ids, [switch - 4, switch - 2, switch, switch + 6])


@pytest.mark.breaks
@pytest.mark.parametrize("rope", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_other_frequencies_show(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: above the switch those of below, which is found before a graph is used."""
    monkeypatch.setattr(rotary, "_chosen", lambda is_long, long, short: short)
    with pytest.raises(UnsupportedError, match="other logits than the model"):
        Pair(make(rope))


@pytest.mark.slow
@pytest.mark.breaks
def test_tokens_that_are_none_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: a static step of two tokens has the length of one of four."""
    inner = StaticInputs.write

    def longer(inputs: StaticInputs, ids: torch.Tensor, *more: Any) -> None:
        inner(inputs, ids, *more)
        inputs.positions.copy_(inputs.positions[:, :1] + torch.arange(inputs.positions.shape[1]))

    monkeypatch.setattr(StaticInputs, "write", longer)
    pair = Pair(make("dynamic"), static_cache=True)
    with pytest.raises(AssertionError, match="logits up to 64: relative error"):
        pair.check(ids_of(70), [60, 62, 64])


def test_attributes_are_never_missing_while_frequencies_are_put_back() -> None:
    """Another thread may run the user's model meanwhile."""
    model, missing = make("dynamic"), list[str]()
    (module,) = rotary.by_length(model)
    names, before = {*vars(module), *module._buffers}, dict(vars(module))

    def look(frame: Any, event: str, argument: Any) -> Any:
        missing.extend(names - {*vars(module), *module._buffers})
        return look if frame.f_globals.get("__name__") == rotary.__name__ else None

    traced = sys.gettrace()
    sys.settrace(look)
    try:
        with rotary.as_written(model):
            module.new, module.config = 1, None
    finally:
        sys.settrace(traced)
    assert not missing
    assert vars(module) == before


def test_classes_of_rotary_embeddings_are_not_kept() -> None:
    module = type("Mine", (type(rotary.by_length(make("dynamic"))[0]),), {})
    made = [weakref.ref(c) for c in (module, rotary._pure(module))]
    assert rotary._pure(module) is rotary._pure(module)
    del module
    gc.collect()
    assert [m() for m in made] == [None, None]


def test_a_longer_text_is_warned_of_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    turns._said.clear()
    with caplog.at_level(logging.WARNING, logger=turns.__name__):
        pair.compiled(ids_of(TRAINED))
        assert not caplog.records
        for _ in range(2):
            pair.compiled(ids_of(TRAINED + 1))
    (record,) = caplog.records
    assert "a sequence of 65 tokens, but " in record.getMessage()


# Tables -----------------------------------------------------------------------------------------

TABLES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 8},
}


class Sliced(OwnDecoder):
    """Its table of 64 positions is cut, not looked up."""

    def forward(
        self, input_ids: Any, position_ids: Any = None, past_key_values: Any = None, **more: Any
    ) -> CausalLMOutputWithPast:
        begin = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = self.places.weight[begin : begin + input_ids.shape[1]]
        logits = self.run(self.embed(input_ids) + places, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


@torch.no_grad()
def test_a_table_that_is_cut_has_an_end() -> None:
    model = own(Sliced, layers=2, max_position_embeddings=64)
    compiled = build(model, None, backend="eager")
    text = torch.randint(0, 31, (1, 65), generator=torch.Generator().manual_seed(0))
    assert_close(compiled(text[:, :64]).logits, model(text[:, :64]).logits, 1e-5, "logits")
    with pytest.raises(
        ValueError, match="a sequence of 65 tokens, but Sliced has positions for 64"
    ):
        compiled(text)


WORDS = "a sequence of 33 tokens, but .* has positions for 32 .*, in a table; shorten it"


def with_table(family: str) -> Pair:
    torch.manual_seed(0)
    ids = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**ids, **TABLES[family])
    name = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return Pair(getattr(transformers, family + name)(config).eval())


class EndsAt(transformers.StoppingCriteria):  # type: ignore[misc]
    """A rule that ends a request at a length, which only its call tells."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("family", ["GPT2", pytest.param("GPTJ", marks=pytest.mark.slow)])
def test_a_table_has_an_end(family: str) -> None:
    pair = with_table(family)
    assert runtime_of(pair.compiled).graphs.max_length == 32
    pair.check(ids_of(32))
    with pytest.raises(ValueError, match=WORDS):
        pair.compiled(ids_of(33))
    with pytest.raises(ValueError, match=WORDS):
        pair.compiled.adaskip.warmup(33)


def test_decoding_to_the_end_of_a_table() -> None:
    pair = with_table("GPT2")
    models = pair.compiled, pair.fresh()
    # as many as there are: the last token is not run
    got, want = (m.generate(ids_of(30), max_new_tokens=3, do_sample=False) for m in models)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=WORDS):
        pair.compiled.generate(ids_of(30), max_new_tokens=5, do_sample=False)
    # padding takes no place in it
    ids, mask = ids_of(30, 2), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :9] = mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    padded, expected = (m.generate(ids, **options) for m in models)
    assert torch.equal(padded, expected)
    # whoever runs ahead does not fall off
    runtime_of(pair.compiled).ahead = True
    end = EndsAt(want.shape[1])
    options = {"max_new_tokens": 9, "do_sample": False, "stopping_criteria": [end]}
    assert torch.equal(pair.compiled.generate(ids_of(30), **options), want)


# What is looked at apart. -----------------------------------------------------------------------


def scaled(module: Any) -> None:
    module.attention_scaling *= 3


def hooked(module: Any) -> None:
    module.register_forward_hook(lambda _, __, output: output)


def edited(module: Any) -> None:
    module.original_inv_freq.mul_(2)


def replaced(module: Any) -> None:
    module.original_inv_freq = module.original_inv_freq * 2


@pytest.mark.parametrize("change", [scaled, hooked, edited, replaced])
@pytest.mark.parametrize("rope", SWITCH, indirect=True)
@pytest.mark.parametrize("whose", ["original", "compiled"])
def test_what_is_changed_in_rotary_embeddings_is_refused(
    rope: str, whose: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(rope)  # which is left as it was
    module = (pair.model if whose == "original" else pair.compiled).model.rotary_emb
    before = (dict(vars(module)), dict(module._buffers), module.original_inv_freq.clone())
    pair.compiled(ids_of(9))
    change(module)
    with pytest.raises(RuntimeError, match="whose frequencies depend on the length, was changed"):
        pair.compiled(ids_of(9))
    vars(module).update(before[0])
    module._forward_hooks.clear()
    module._buffers.update(before[1])
    module.original_inv_freq.copy_(before[2])
    pair.check(ids_of(9))


@pytest.mark.parametrize("rope", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_what_its_own_forward_writes_is_no_change(rope: str) -> None:
    """The near miss: long texts, and another dtype."""
    pair = Pair(make(rope))
    for tokens in (9, 80, 9):
        pair.model(ids_of(tokens))
        pair.compiled(ids_of(tokens))
    pair.model.to(torch.bfloat16)
    assert pair.compiled(ids_of(9)).logits.dtype == torch.bfloat16


def test_padding_has_places_in_a_table_where_no_positions_are_given() -> None:
    pair, ids = with_table("GPT2"), ids_of(33, 2)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    with pytest.raises(ValueError, match=WORDS):
        pair.compiled(ids, attention_mask=mask)
    places = (torch.arange(33) - 4).clamp_min(0).expand(2, -1)
    real, given = mask.bool(), {"attention_mask": mask, "position_ids": places}
    with torch.no_grad():
        got, want = (m(ids, **given).logits[real] for m in (pair.compiled, pair.fresh()))
    assert_close(got, want, 1e-5, "logits")
