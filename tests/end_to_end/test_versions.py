"""What transformers' versions call a cache: the product goes by the installed one's name.

5.24 says ``cache`` where versions before say ``past_key_values`` (or ``cache_params``), takes the
old names with a warning, and asks a cache whether its layers are linear before it continues it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import generic

import adaskip_fx
from adaskip_fx.api import build
from adaskip_fx.capture.reference import run_reference
from adaskip_fx.evaluation.examples import Generate
from adaskip_fx.evaluation.scoring import generated, stepped_logits
from adaskip_fx.kv_cache import argument_names
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.measurement.timer import EagerTimer, StepTimer
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.testing import assert_equivalent
from tests.support.compiled_llamas import entry, make_model
from tests.support.custom_decoders import own
from tests.support.families.all import tiny_config, tiny_model
from tests.support.generation import counted
from tests.support.tokenizers import Letters

RENAMED = Version(transformers.__version__) >= Version("5.24")
NAME = "cache" if RENAMED else "past_key_values"

since_5_24 = pytest.mark.skipif(not RENAMED, reason="transformers has one name for a cache")
before_5_24 = pytest.mark.skipif(RENAMED, reason="transformers knows the name")


@pytest.fixture
def nothing_old(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever transformers says of a deprecated name is an error."""

    def refuse(message: str, *rest: Any) -> None:
        assert "deprecated" not in message, message

    monkeypatch.setattr(generic.logger, "warning_once", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


# The product's own calls ---------------------------------------------------------------------


def two_turns(model: Any, name: str = NAME) -> tuple[list[int], Any]:
    """Tokens of two greedy turns on one cache, the second of them handed all of the text."""
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(entry().tokens(1, 6), **options)
    said = torch.cat((first.sequences, entry().tokens(1, 3, 1)), 1)
    held = getattr(first, NAME)
    second = model.generate(said, **{name: held}, **options)
    assert getattr(second, NAME) is held
    tokens: list[int] = second.sequences.tolist()[0]
    return tokens, held


@pytest.mark.slow
def test_only_this_versions_names_are_used(nothing_old: None) -> None:
    """Calibrate, compile, prompts, decode steps, two turns, and what judges and measures."""
    model = make_model("one_layer")
    profile = adaskip_fx.calibrate(model, Letters(), ["a text of some length"], max_length=32)
    skipped = adaskip_fx.compile(model, profile, alpha=2, backend="eager")
    assert len(two_turns(skipped)[0]) == 17
    rows = stepped_logits(skipped, range(3, 12), 3)
    assert rows.shape[0] == 3
    assert generated(skipped, _Decoder(), Generate((1, 2, 3), ("3",), "contains", 2))
    assert StepTimer(runtime_of(skipped))("decode", 16, skipped.adaskip.plan) > 0
    assert EagerTimer(model)("decode", 16) > 0
    with entry().using():
        assert two_turns(entry().compiled)[0] == two_turns(entry().model)[0]
    assert_equivalent(model, decode_steps=1)


class _Decoder:
    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        return str(tokens.tolist())


@since_5_24
def test_an_old_name_would_be_noticed(nothing_old: None) -> None:
    """The companion: in arguments, and in an output."""
    bank = entry()
    with torch.no_grad():
        with pytest.raises(FutureWarning, match="`past_key_values` is deprecated"):
            bank.model(bank.tokens(1, 2), past_key_values=DynamicCache())
        output = bank.model(bank.tokens(1, 2))
        with pytest.raises(AssertionError, match="deprecated"):
            _ = output.past_key_values


# A second turn ---------------------------------------------------------------------------------


def test_a_second_turn_runs_its_new_tokens_alone() -> None:
    bank = entry()
    with bank.using(), counted(bank) as steps:
        mine, cache = two_turns(bank.compiled)
    assert mine == two_turns(bank.model)[0]
    assert steps == [6, 1, 1, 1, 4, 1, 1, 1]  # the last token of a turn is not stored yet
    assert cache.get_seq_length() == 16


@since_5_24
def test_a_cache_that_says_nothing_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: ``all([])`` is true, and then all of the text is put to the filled cache."""
    bank = entry()
    monkeypatch.setattr(SkipCache, "is_linear", [])
    with bank.using(), counted(bank) as steps:
        assert two_turns(bank.compiled)[0] != two_turns(bank.model)[0]
    assert steps == [6, 1, 1, 1, 13, 1, 1, 1]


class _Nobody:
    buffer_pool: Any = None

    def track(self, cache: SkipCache) -> None: ...


@pytest.mark.parametrize("family", ["llama", "mamba", "bamba", "falcon_h1"])
def test_layers_are_linear_as_in_transformers_own_cache(family: str) -> None:
    """Attention; mixers alone; some layers of either; both in each layer (not linear)."""
    model = tiny_model(tiny_config(family))
    with torch.no_grad():
        output = model(input_ids=torch.arange(5).unsqueeze(0), use_cache=True)
    specs = run_reference(model).specs
    cache = SkipCache(_Nobody(), specs, specs, torch.float32, torch.device("cpu"))
    linear = argument_names.cache_of(output).is_linear
    assert cache.is_linear == linear
    assert any(linear) == (family in ("mamba", "bamba"))


# Names that a caller may use -------------------------------------------------------------------


@pytest.mark.parametrize("given", ["cache", "past_key_values", "cache_params", "positional"])
def test_forward_takes_every_name(given: str) -> None:
    bank, ids = entry(), entry().tokens(1, 7)
    with bank.using(), torch.no_grad():
        cache = bank.runtime.new_cache()
        for part in ids[:, :4], ids[:, 4:6], ids[:, 6:]:
            if given == "positional":
                output = bank.compiled(part, None, None, cache)
            else:
                output = bank.compiled(part, **{given: cache})
            assert getattr(output, NAME) is cache
        expected = bank.model(ids).logits[:, -1:]
    torch.testing.assert_close(output.logits, expected)
    assert cache.get_seq_length() == 7


def test_two_names_for_one_cache() -> None:
    """Refused when they are two caches; ``None`` is none."""
    bank, ids = entry(), entry().tokens(1, 4)
    with bank.using(), torch.no_grad():
        one, other = bank.runtime.new_cache(), bank.runtime.new_cache()
        message = "cache and past_key_values are two names for one cache; give one of them"
        with pytest.raises(ValueError, match=message):
            bank.compiled(ids, cache=one, past_key_values=other)
        bank.compiled(ids, cache=one, past_key_values=one)
        assert (one.get_seq_length(), other.get_seq_length()) == (4, 0)
        bank.compiled(ids[:, :1], cache=None, past_key_values=one)
        bank.compiled(ids[:, :1], cache=one, past_key_values=None)
        assert one.get_seq_length() == 6


@since_5_24
@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_generate_takes_an_old_name(name: str) -> None:
    with entry().using(), pytest.warns(FutureWarning, match=f"`{name}` is deprecated"):
        mine = two_turns(entry().compiled, name)[0]
    assert mine == two_turns(entry().model)[0]


@since_5_24
def test_generate_with_both_names_uses_the_new_one() -> None:
    """As transformers does, which warns."""
    bank = entry()
    with bank.using():
        new, old = bank.runtime.new_cache(), bank.runtime.new_cache()
        options = {"cache": new, "past_key_values": old, "max_new_tokens": 2}
        with pytest.warns(FutureWarning, match="ignoring deprecated `past_key_values="):
            bank.compiled.generate(bank.tokens(1, 4), **options)
    assert (new.get_seq_length(), old.get_seq_length()) == (5, 0)


@before_5_24
def test_generate_refuses_a_name_that_is_not_known_yet() -> None:
    bank = entry()
    with bank.using(), pytest.raises(ValueError, match=r"not used by the model: \['cache'\]"):
        bank.compiled.generate(bank.tokens(1, 4), cache=bank.runtime.new_cache())


def greedy(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The next tokens, each from a forward of all before it."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.slow
def test_a_forward_of_ones_own_that_kept_the_old_name() -> None:
    """5.24's ``generate`` says ``cache`` to it all the same (the eager model then forgets its own).

    A request goes on with the cache that was given, and there is no other beside it.
    """
    model = own()
    fast = build(model, None, backend="eager")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    ids, cache = torch.arange(9).unsqueeze(0), fast.adaskip.new_cache()
    first = fast.generate(ids, **{NAME: cache}, **options)
    assert torch.equal(first.sequences, greedy(model, ids, 3))
    said = torch.cat((first.sequences, ids[:, 3:6]), 1)
    second = fast.generate(said[:, 11:], **{NAME: cache}, **options)
    assert torch.equal(second.sequences, greedy(model, said, 3)[:, 11:])
    assert argument_names.cache_of(first) is argument_names.cache_of(second) is cache
    assert cache.get_seq_length() == 17


# By the signature ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "cache_params", "past_key_values"])
def test_the_name_of_a_forward(name: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, input_ids, {name}=None, **kwargs): pass", scope)
    forward = scope["forward"]
    assert argument_names.cache_argument(forward) == name
    assert argument_names.generate_argument(forward) == ("cache" if RENAMED else name)


def test_outputs_are_made_and_read_by_their_own_name(nothing_old: None) -> None:
    held = DynamicCache()
    output = CausalLMOutputWithPast(**argument_names.output_fields(CausalLMOutputWithPast, held))
    assert argument_names.cache_of(output) is held
    assert list(output) == [NAME]
    assert argument_names.cache_of(CausalLMOutputWithPast()) is None


# Profiles --------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A model that has nothing but a config."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: config, model_type="phi")

    def get_input_embeddings(self) -> None:
        return None

    get_output_embeddings = get_input_embeddings


def digest_of(config: dict[str, Any]) -> str:
    return fingerprint(Bare(config)).digest


def test_a_profile_of_an_older_version_is_of_the_same_model() -> None:
    """What part of a head is rotated was said in two places once."""
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    newer = {"hidden_size": 32, "rope_parameters": rope}
    assert digest_of({**newer, "partial_rotary_factor": 0.5}) == digest_of(newer)
    other = {**newer, "rope_parameters": {**rope, "partial_rotary_factor": 0.25}}
    assert digest_of(other) != digest_of(newer)
    bare = {"hidden_size": 32, "rope_parameters": {"rope_type": "default"}}
    assert digest_of({**bare, "partial_rotary_factor": 0.5}) != digest_of(bare)
