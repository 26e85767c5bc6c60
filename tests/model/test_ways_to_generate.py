"""Ways of `generate` besides greedy and sampling: the tokens of the oracle's own `generate`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, WatermarkingConfig, pipeline

from adaskip_fx.kv_cache.cache import SkipCache
from tests.support.characters import character_tokenizer
from tests.support.compiled_llamas import Entry, entry, fixed
from tests.support.generation import mixed_plan, padded

SHAPE = "grouped"
BEAMS = MappingProxyType({"num_beams": 3})


def _allowed(row: int, ids: torch.Tensor) -> list[int]:
    """Every third token of the vocabulary, others at each length."""
    return list(range(len(ids) % 3, 60, 3))


#: Options of `generate`, and how many rows the prompt has.
WAYS: Mapping[str, tuple[int, dict[str, Any]]] = MappingProxyType(
    {
        "beams": (1, {**BEAMS}),
        "beams of a batch": (2, {"num_beams": 4, "num_return_sequences": 2}),
        "beams that end": (2, {**BEAMS, "eos_token_id": [5, 6, 7, 8, 9], "early_stopping": True}),
        "beams that never stop early": (
            1,
            {**BEAMS, "eos_token_id": [5], "early_stopping": "never"},
        ),
        "beams, sampled": (2, {**BEAMS, "do_sample": True, "temperature": 1.5}),
        "beams without a cache": (1, {**BEAMS, "use_cache": False}),
        "beams after chunks": (1, {**BEAMS, "prefill_chunk_size": 4}),
        "beams, penalised": (1, {**BEAMS, "length_penalty": -2.0, "repetition_penalty": 1.5}),
        "beams of allowed tokens": (1, {**BEAMS, "prefix_allowed_tokens_fn": _allowed}),
        "allowed tokens": (2, {"prefix_allowed_tokens_fn": _allowed}),
        "several samples": (2, {"num_return_sequences": 3, "do_sample": True}),
        "a watermark": (1, {"watermarking_config": WatermarkingConfig(bias=2.5)}),
        "enough time": (1, {"max_time": 1000.0}),
        "no time": (1, {"max_time": 0.0}),
    }
)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(3)
    given = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return model.generate(ids, **{"attention_mask": mask, **given, **options})


@pytest.mark.parametrize("plan", ["empty", "mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_those_of_the_eager_model(way: str, plan: str) -> None:
    bank = entry(SHAPE)
    rows, options = WAYS[way]
    with bank.using(mixed_plan(bank) if plan == "mixed" else None):
        if plan == "mixed" and not options.get("use_cache", True):
            bank.oracle.decode = bank.oracle.prefill  # every step is a prompt then
        got, want = (
            generated(model, bank.tokens(rows, 7, 2), **options)
            for model in (bank.compiled, bank.oracle.model)
        )
    assert torch.equal(got, want)


def test_beams_on_a_static_cache() -> None:
    """Rows are put in another order where they are, as on a GPU."""
    bank = fixed(SHAPE)
    with bank.using(mixed_plan(bank)):
        got, want = (
            generated(model, bank.tokens(2, 7, 2), **BEAMS)
            for model in (bank.compiled, bank.oracle.model)
        )
    assert torch.equal(got, want)


@pytest.mark.breaks
def test_beams_that_are_not_reordered_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(SkipCache, "reorder_cache", lambda self, rows: None)
    with pytest.raises(AssertionError):
        test_the_tokens_are_those_of_the_eager_model("beams of a batch", "mixed")


def test_beams_of_a_padded_batch_and_all_that_they_return() -> None:
    bank = entry(SHAPE)
    ids, mask, _ = padded(bank)
    asked = {
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        **{"attention_mask": mask, "num_return_sequences": 2},
    }
    with bank.using(mixed_plan(bank)):
        got, want = (
            generated(model, ids, **BEAMS, **asked) for model in (bank.compiled, bank.oracle.model)
        )
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.beam_indices, want.beam_indices)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores)
    for kind in ("scores", "logits"):
        for mine, theirs in zip(getattr(got, kind), getattr(want, kind), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    assert got.past_key_values.batch_size == 6


def test_beams_on_a_prefix_that_is_stored() -> None:
    """A row of the cache for each beam, as transformers wants it."""
    bank = entry(SHAPE)
    tokens = []
    with bank.using(mixed_plan(bank)), torch.no_grad():
        for model, cache in (
            (bank.compiled, bank.runtime.new_cache()),
            (bank.oracle.model, bank.reference_cache()),
        ):
            ids = bank.tokens(1, 6)
            model(ids, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(3)
            text = torch.cat((ids, bank.tokens(1, 3, 1)), 1)
            tokens.append(generated(model, text, past_key_values=cache, **BEAMS))
    assert torch.equal(*tokens)


# A loop of one's own, and whatever needs a tokenizer -------------------------------------------


def _second_best(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """A loop of a user's own, which takes the second best token every time."""
    steps = {"next_sequence_length": None}
    while True:
        inputs = model.prepare_inputs_for_generation(input_ids, **steps, **kwargs)
        steps = {"next_sequence_length": 1}
        outputs = model(**inputs, return_dict=True)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1])
        input_ids = torch.cat((input_ids, scores.topk(2).indices[:, 1:]), 1)
        if bool(stopping_criteria(input_ids, None).all()):
            return input_ids


def test_a_loop_of_the_callers_own() -> None:
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)), torch.no_grad():
        got, want = (
            generated(model, bank.tokens(1, 7, 2), custom_generate=_second_best)
            for model in (bank.compiled, bank.oracle.model)
        )
        best = generated(bank.compiled, bank.tokens(1, 7, 2))
    assert torch.equal(got, want)
    assert not torch.equal(got, best)


@functools.cache
def tokenizer() -> Any:
    return character_tokenizer()


def test_text_streams_to_another_thread() -> None:
    bank = entry(SHAPE)
    ids = tokenizer()("aBc4dEf", return_tensors="pt")["input_ids"]
    said = []
    with bank.using(mixed_plan(bank)):
        for model in (bank.compiled, bank.oracle.model):
            streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
            thread = threading.Thread(
                target=generated, args=(model, ids), kwargs={"streamer": streamer}
            )
            thread.start()
            said.append("".join(streamer))
            thread.join()
        whole = generated(bank.oracle.model, ids)[0, ids.shape[1] :]
    assert said[0] == said[1] == tokenizer().decode(whole)


@pytest.mark.parametrize("beams", [1, 3])
def test_strings_that_end_a_text(beams: int) -> None:
    bank = entry(SHAPE)
    ids = tokenizer()("aBc4dEf", return_tensors="pt")["input_ids"]
    with bank.using(mixed_plan(bank)):
        whole = generated(bank.oracle.model, ids)[0]
        stop = tokenizer().decode(whole[-4:-2])
        options = {"stop_strings": [stop], "tokenizer": tokenizer(), "num_beams": beams}
        got, want = (generated(m, ids, **options) for m in (bank.compiled, bank.oracle.model))
    assert torch.equal(got, want)
    if beams == 1:
        assert got.shape[1] < whole.shape[0]


def _texts(bank: Entry, model: Any, given: Any, **options: Any) -> Any:
    made = pipeline("text-generation", model=model, tokenizer=tokenizer(), **options)
    return made(given, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pipeline(batch: int, beams: int) -> None:
    """With texts of other lengths, which it pads, and with a chat, which it puts into its form."""
    bank = entry(SHAPE)
    texts = ["aBc4dEf", "Gh2", "k", "lmNoP"]
    chat = [{"role": "assistant", "content": "aBc"}, {"role": "user", "content": "dE"}]
    with bank.using(mixed_plan(bank)):
        for given in (texts, chat):
            got, want = (
                _texts(bank, model, given, batch_size=batch, num_beams=beams)
                for model in (bank.compiled, bank.oracle.model)
            )
            assert got == want
    assert got[0]["generated_text"][:2] == chat


# Caches that a generation config names ----------------------------------------------------------


@pytest.mark.parametrize("name", ["dynamic", "static"])
@pytest.mark.parametrize("where", ["checkpoint", "argument"])
def test_caches_that_are_ours_by_another_name(name: str, where: str) -> None:
    bank = entry(SHAPE)
    ids = bank.tokens(1, 7, 2)
    mine = bank.compiled.generation_config
    asked = {"cache_implementation": name} if where == "argument" else {}
    with bank.using(mixed_plan(bank)):
        want = generated(bank.oracle.model, ids)
        try:
            mine.cache_implementation = name if where == "checkpoint" else None
            got = generated(bank.compiled, ids, return_dict_in_generate=True, **asked)
            with pytest.raises(ValueError, match="asks for a new cache, but"):
                generated(bank.compiled, ids, past_key_values=got.past_key_values, **asked)
        finally:
            mine.cache_implementation = None
    assert torch.equal(got.sequences, want)
    assert isinstance(got.past_key_values, SkipCache)


def test_room_for_a_longest_request() -> None:
    bank = entry(SHAPE)
    with bank.using():
        got = generated(
            bank.compiled,
            bank.tokens(1, 300),
            return_dict_in_generate=True,
            **{"cache_implementation": "static", "max_cache_len": 550, "max_new_tokens": 2},
        )
    assert 550 <= got.past_key_values.capacity < 550 + 256


NOT_HERE: Mapping[str, tuple[dict[str, Any], str]] = MappingProxyType(
    {
        **{
            name: (
                {"cache_implementation": name},
                f"cache_implementation='{name}' is not supported: a compiled model makes its own "
                "cache, .* leave it out, of the generation config as well",
            )
            for name in ("offloaded", "offloaded_static", "quantized")
        },
        "first layers": (
            {"assistant_early_exit": 1},
            "assistant_early_exit=1 is not supported by adaskip_fx yet: drafts of the model's "
            "first layers are not captured; pass an assistant_model",
        ),
        "heads for several tokens": (
            {"use_mtp": True},
            "use_mtp=True is not supported .* own heads .* use prompt_lookup_num_tokens",
        ),
        "hidden states": (
            {"speculation_type": "dflash", "prompt_lookup_num_tokens": 2},
            "speculation_type='dflash' is not supported .* need the model's hidden states",
        ),
        "contrastive search": (
            {"penalty_alpha": 0.6, "top_k": 4, "custom_generate": _second_best},
            "contrastive search is not supported by adaskip_fx yet: .* use greedy search, sampling "
            "or beam search, or the original model",
        ),
    }
)


@pytest.mark.parametrize("case", NOT_HERE)
def test_what_is_refused(case: str) -> None:
    bank = entry(SHAPE)
    options, message = NOT_HERE[case]
    before = vars(bank.compiled.config).copy()
    if not hasattr(bank.compiled.generation_config, next(iter(options))):
        pytest.skip("this transformers does not have it")
    with bank.using(), pytest.raises(NotImplementedError, match=message):
        generated(bank.compiled, bank.tokens(1, 7), **options)
    assert vars(bank.compiled.config) == before
