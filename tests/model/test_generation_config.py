"""Every field of `GenerationConfig`: `docs/reference/generation.md` says what comes of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, WatermarkingConfig

from tests.support.characters import character_tokenizer
from tests.support.compiled_llamas import entry, make_model

PAGE = Path(__file__).parents[2] / "docs/reference/generation.md"
SAMPLED = MappingProxyType({"do_sample": True, "temperature": 2.0})
BEAMS = MappingProxyType({"num_beams": 3})
ENDS = MappingProxyType({**BEAMS, "eos_token_id": [5, 6, 7, 8, 9, 10, 11, 12]})
ALL = MappingProxyType({"return_dict_in_generate": True})


class Compared(NamedTuple):
    """A field with another value than its default.

    Attributes:
        value: of the field.
        others: what it needs to be read.
        shows: whether the eager model's tokens, or how much it returns, are others with it.
    """

    value: Any
    others: Mapping[str, Any] = MappingProxyType({})
    shows: bool = True


def _drafts() -> dict[str, Any]:
    return {"assistant_model": make_model("one_layer", seed=5)}


COMPARED: Mapping[str, Compared] = MappingProxyType(
    {
        "max_length": Compared(11, {"max_new_tokens": None}, shows=False),
        "max_new_tokens": Compared(4),
        "min_length": Compared(12, ENDS),
        "min_new_tokens": Compared(8, ENDS),
        "early_stopping": Compared(True, ENDS, shows=False),
        "max_time": Compared(0.0),
        "stop_strings": Compared([*"abcdefghijklmnop"], {"tokenizer": character_tokenizer()}),
        "do_sample": Compared(True),
        "num_beams": Compared(3),
        "num_return_sequences": Compared(2, BEAMS),
        "use_cache": Compared(False, shows=False),
        "cache_implementation": Compared("static", shows=False),
        "cache_config": Compared({"backend": "quanto"}, shows=False),
        "max_cache_len": Compared(40, {"cache_implementation": "static"}, shows=False),
        "prefill_chunk_size": Compared(3, shows=False),
        "temperature": Compared(4.0, {"do_sample": True}),
        "top_k": Compared(2, SAMPLED),
        "top_p": Compared(0.2, SAMPLED),
        "min_p": Compared(0.3, SAMPLED),
        "top_h": Compared(0.2, SAMPLED),
        "typical_p": Compared(0.2, SAMPLED),
        "epsilon_cutoff": Compared(0.1, SAMPLED),
        "eta_cutoff": Compared(0.2, SAMPLED),
        "repetition_penalty": Compared(3.0),
        "encoder_repetition_penalty": Compared(5.0),
        "no_repeat_ngram_size": Compared(1),
        "encoder_no_repeat_ngram_size": Compared(1, {**SAMPLED, "max_new_tokens": 30}),
        "length_penalty": Compared(-9.0, ENDS, shows=False),
        "exponential_decay_length_penalty": Compared((1, 9.0), {"eos_token_id": 5}),
        "bad_words_ids": Compared([[i] for i in range(2, 40)]),
        "suppress_tokens": Compared(list(range(2, 40))),
        "begin_suppress_tokens": Compared(list(range(2, 60))),
        "sequence_bias": Compared({(7,): 50.0}),
        "forced_bos_token_id": Compared(7, shows=False),
        "forced_eos_token_id": Compared(7),
        "renormalize_logits": Compared(True, shows=False),
        "remove_invalid_values": Compared(True, shows=False),
        "guidance_scale": Compared(3.0),
        "watermarking_config": Compared(WatermarkingConfig(bias=9.0)),
        "return_dict_in_generate": Compared(True, shows=False),
        "output_scores": Compared(True, ALL),
        "output_logits": Compared(True, ALL),
        "output_hidden_states": Compared(True, ALL),
        "pad_token_id": Compared(3, {**SAMPLED, **ENDS, "num_beams": 1, "num_return_sequences": 5}),
        "bos_token_id": Compared(9, shows=False),
        "eos_token_id": Compared(list(range(2, 30))),
        "decoder_start_token_id": Compared(4, shows=False),
        "prompt_lookup_num_tokens": Compared(3, shows=False),
        "max_matching_ngram_size": Compared(1, {"prompt_lookup_num_tokens": 3}, shows=False),
        "num_assistant_tokens": Compared(3, _drafts(), shows=False),
        "num_assistant_tokens_schedule": Compared("heuristic", _drafts(), shows=False),
        "assistant_confidence_threshold": Compared(0.9, _drafts(), shows=False),
        "assistant_ensemble_weight": Compared(0.1, _drafts()),
        "compile_config": Compared(CompileConfig(), shows=False),
        "disable_compile": Compared(True, shows=False),
    }
)

#: Fields that are not compared here, and why.
APART: Mapping[str, str] = MappingProxyType(
    {
        "assistant_lookbehind": "of a tokenizer apart: tests/model/test_assisted_generation.py",
        "target_lookbehind": "of a tokenizer apart: tests/model/test_assisted_generation.py",
        "is_assistant": "transformers sets it, for the drafts of test_assisted_generation.py",
        "token_healing": "of a text: test_token_healing",
        "transformers_version": "nothing reads it",
    }
)

_ON_THE_HUB = (ValueError, "requires `trust_remote_code=True`")
#: What is asked for, and the error: ours, or transformers' own.
REFUSED: Mapping[str, tuple[dict[str, Any], type[Exception], str]] = MappingProxyType(
    {
        "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, *_ON_THE_HUB),
        "dola_layers": ({"dola_layers": "low"}, *_ON_THE_HUB),
        "num_beam_groups": ({"num_beams": 4, "num_beam_groups": 2}, *_ON_THE_HUB),
        "diversity_penalty": (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
            *_ON_THE_HUB,
        ),
        "constraints": ({"num_beams": 2, "constraints": [1]}, *_ON_THE_HUB),
        "force_words_ids": ({"num_beams": 2, "force_words_ids": [[3]]}, *_ON_THE_HUB),
        "low_memory": (
            {"num_beams": 2, "low_memory": True},
            ValueError,
            "`low_memory=True` is not supported",
        ),
        "output_attentions": (
            {"output_attentions": True},
            NotImplementedError,
            r"forward\(output_attentions=...\) is not supported by adaskip_fx yet",
        ),
        "assistant_early_exit": (
            {"assistant_early_exit": 1},
            NotImplementedError,
            "drafts of the model's first layers are not captured; pass an assistant_model",
        ),
        "use_mtp": (
            {"use_mtp": True},
            NotImplementedError,
            "drafts of the model's own heads for several tokens are not captured",
        ),
        "speculation_type": (
            {"speculation_type": "dflash", "prompt_lookup_num_tokens": 2},
            NotImplementedError,
            "drafts that need the model's hidden states are not captured",
        ),
        "continuous_batching_config": (
            {"cache_implementation": "paged"},
            NotImplementedError,
            r"continuous batching \(generate_batch, a paged cache\) is not supported",
        ),
    }
)


@functools.cache
def documented() -> Mapping[str, str]:
    """What the page says of each field: same, ours or refused."""
    found: dict[str, str] = {}
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and cells[1].startswith("`"):
            for field in re.findall(r"`(\w+)`", cells[1]):
                assert field not in found, f"{field} is there twice"
                found[field] = cells[2]
                assert cells[3] or cells[2] == "same", f"{field}: what differs, or why not?"
    return found


def installed() -> set[str]:
    """The fields of the installed version."""
    return {field for field in vars(GenerationConfig()) if not field.startswith("_")}


def test_every_field_of_the_installed_version_is_documented() -> None:
    assert len(installed()) > 60
    assert not installed() - set(documented())


def test_every_documented_field_is_backed_by_a_test() -> None:
    refused = {field for field, here in documented().items() if here == "refused"}
    others = {field for field, here in documented().items() if here in ("same", "ours")}
    assert refused == set(REFUSED)
    assert others == set(COMPARED) | set(APART)
    assert not set(COMPARED) & set(APART)
    assert refused | others == set(documented())


def test_a_field_that_this_version_lacks_is_an_exception() -> None:
    """A name that is written wrong is none that a version lacks."""
    assert len(set(documented()) - installed()) < 5


def generated(model: Any, options: Mapping[str, Any]) -> Any:
    torch.manual_seed(4)
    ids = entry("grouped").tokens(1, 7, 6)
    given = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    got = model.generate(ids, **{"attention_mask": torch.ones_like(ids), **given, **options})
    return got


def _parts(output: Any) -> dict[str, Any]:
    """Tokens, and whatever else was asked for but the cache."""
    if isinstance(output, torch.Tensor):
        return {"sequences": output}
    return {name: output[name] for name in output if not hasattr(output[name], "get_seq_length")}


def _differ(one: Any, other: Any) -> bool:
    mine, theirs = _parts(one), _parts(other)
    return list(mine) != list(theirs) or not torch.equal(mine["sequences"], theirs["sequences"])


@pytest.mark.parametrize("skipped", [[], ["0.ffn"]], ids=["nothing", "an FFN"])
@pytest.mark.parametrize("field", COMPARED)
def test_a_field_means_what_it_means_to_the_eager_model(field: str, skipped: list[str]) -> None:
    if field not in installed():
        pytest.skip("this transformers does not have it")
    value, others, shows = COMPARED[field]
    config = GenerationConfig()
    assert value not in (getattr(config, field), config._get_default_generation_params().get(field))
    bank = entry("grouped")
    with bank.using(bank.plan(skipped)):
        got, want = (
            generated(model, {**others, field: value})
            for model in (bank.compiled, bank.oracle.model)
        )
        without = generated(bank.oracle.model, others) if shows else None
    mine, theirs = _parts(got), _parts(want)
    assert list(mine) == list(theirs)
    assert torch.equal(mine["sequences"], theirs["sequences"])
    for kind in {"scores", "logits"} & set(mine):
        for one, other in zip(mine[kind], theirs[kind], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if shows and not skipped:
        assert _differ(want, without), "the field does nothing in this call"


def test_token_healing() -> None:
    """The last token of a prompt is chosen again, by a `generate` inside of `generate`."""
    bank, words = entry("grouped"), character_tokenizer()
    ids = words("kBd4a", return_tensors="pt")["input_ids"]
    asked = {"tokenizer": words, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 4}
    with bank.using(bank.plan(["0.ffn"])):
        got, want, without = (
            model.generate(ids, token_healing=heals, **asked)
            for model, heals in (
                (bank.compiled, True),
                (bank.oracle.model, True),
                (bank.oracle.model, False),
            )
        )
    assert torch.equal(got, want)
    assert not torch.equal(want, without)


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_refused_says_why(field: str) -> None:
    if field not in installed():
        pytest.skip("this transformers does not have it")
    options, error, words = REFUSED[field]
    bank = entry("grouped")
    with bank.using(), pytest.raises(error, match=words):
        generated(bank.compiled, options)


@pytest.mark.breaks
def test_a_field_that_does_not_arrive_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    compiled = entry("grouped").compiled
    monkeypatch.setattr(type(compiled), "_get_logits_processor", lambda *args, **kwargs: _nothing)
    with pytest.raises(AssertionError):
        test_a_field_means_what_it_means_to_the_eager_model("suppress_tokens", [])


def _nothing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores


@pytest.mark.breaks
def test_a_field_that_is_new_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    was = installed()
    monkeypatch.setitem(globals(), "installed", lambda: {*was, "new_field"})
    with pytest.raises(AssertionError):
        test_every_field_of_the_installed_version_is_documented()
