"""The recipes of transformers' documentation for caches, word for word, on both models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from adaskip_fx.kv_cache import cache as cache_module
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.plans.decisions import Schedule
from tests.support.characters import character_tokenizer
from tests.support.compiled_llamas import entry
from tests.support.generation import mixed_plan
from tests.support.hybrids import hybrid

SHAPE = "grouped"
TOKENIZER = character_tokenizer()
PREFIX = "aBcDeF3h"
ANSWERS = ("kLm", "n2p")
GREEDY = MappingProxyType({"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0})


def _inputs(*texts: str) -> Any:
    return TOKENIZER(list(texts), return_tensors="pt", return_token_type_ids=False)


def _filled(model: Any, *texts: str) -> Any:
    """An empty cache that was passed in, and filled."""
    cache = DynamicCache()
    model(**_inputs(*texts), past_key_values=cache, logits_to_keep=1)
    return cache


def _loop(model: Any, path: Path) -> torch.Tensor:
    past_key_values = DynamicCache(config=model.config)
    inputs = dict(_inputs(PREFIX))
    generated_ids = inputs["input_ids"]
    for _ in range(6):
        outputs = model(**inputs, past_key_values=past_key_values, use_cache=True)
        next_token_ids = outputs.logits[:, -1:].argmax(-1)
        generated_ids = torch.cat([generated_ids, next_token_ids], dim=-1)
        attention_mask = inputs["attention_mask"]
        attention_mask = torch.cat(
            [attention_mask, attention_mask.new_ones((attention_mask.shape[0], 1))], dim=-1
        )
        inputs = {"input_ids": next_token_ids, "attention_mask": attention_mask}
    return generated_ids


def _chat(model: Any, path: Path) -> list[Any]:
    past_key_values = DynamicCache()
    messages: list[Any] = []
    for prompt in ("aBc", "d5f", "gH"):
        messages.append({"role": "user", "content": prompt})
        inputs = TOKENIZER.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs.pop("token_type_ids", None)
        input_length = inputs["input_ids"].shape[1]
        outputs = model.generate(**inputs, **GREEDY, past_key_values=past_key_values)
        completion = TOKENIZER.decode(outputs[0, input_length:])
        messages.append({"role": "assistant", "content": completion[0]})
    return messages


def _prefixes(model: Any, path: Path) -> torch.Tensor:
    prompt_cache = model(**_inputs(PREFIX), past_key_values=DynamicCache()).past_key_values
    responses = []
    for prompt in ANSWERS:
        new_inputs = _inputs(PREFIX + prompt)
        past_key_values = copy.deepcopy(prompt_cache)
        outputs = model.generate(**new_inputs, past_key_values=past_key_values, **GREEDY)
        responses.append(outputs)
    return torch.cat(responses)


def _repeated(model: Any, path: Path) -> torch.Tensor:
    cache = _filled(model, PREFIX)
    cache.batch_repeat_interleave(2)
    texts = (PREFIX + answer for answer in ANSWERS)
    return model.generate(**_inputs(*texts), past_key_values=cache, **GREEDY)


def _selected(model: Any, path: Path) -> torch.Tensor:
    cache = _filled(model, "abcd", "EFGH", "23ij")
    cache.batch_select_indices(torch.tensor([2, 0]))
    return model.generate(**_inputs("23ijkl", "abcdkl"), past_key_values=cache, **GREEDY)


def _reordered(model: Any, path: Path) -> torch.Tensor:
    cache = _filled(model, "abcd", "EFGH")
    cache.reorder_cache(torch.tensor([1, 1]))
    return model.generate(**_inputs("EFGHij", "EFGHkl"), past_key_values=cache, **GREEDY)


def _cropped(model: Any, path: Path) -> torch.Tensor:
    cache = _filled(model, PREFIX + "zzz")
    cache.crop(-3)
    return model.generate(**_inputs(PREFIX + "kL"), past_key_values=cache, **GREEDY)


def _layers(model: Any, path: Path) -> torch.Tensor:
    """Keys and values of each layer to the disk, and into a new cache."""
    cache = _filled(model, PREFIX)
    torch.save([(layer.keys, layer.values) for layer in cache.layers], path / "pairs.pt")
    again = DynamicCache()
    for layer, (keys, values) in enumerate(torch.load(path / "pairs.pt")):
        again.update(keys, values, layer)
    return model.generate(**_inputs(PREFIX + "kL"), past_key_values=again, **GREEDY)


def _saved(model: Any, path: Path) -> torch.Tensor:
    torch.save(_filled(model, PREFIX), path / "prefix.pt")
    cache = torch.load(path / "prefix.pt", weights_only=False)
    return model.generate(**_inputs(PREFIX + "kL"), past_key_values=cache, **GREEDY)


RECIPES: Mapping[str, Callable[[Any, Path], Any]] = MappingProxyType(
    {
        "a loop by hand": _loop,
        "a chat": _chat,
        "a prefix for several": _prefixes,
        "rows repeated": _repeated,
        "rows selected": _selected,
        "rows in another order": _reordered,
        "tokens taken back": _cropped,
        "layers saved": _layers,
        "a cache saved": _saved,
    }
)
#: They hand on all that a model stores, so nothing that is stored may be left out.
WHOLE = ("layers saved", "a cache saved")


@pytest.mark.parametrize(
    ("recipe", "plan"),
    [(r, p) for r in RECIPES for p in ("empty", "mixed") if p == "empty" or r not in WHOLE],
)
def test_a_recipe_gives_what_it_gives_with_the_eager_model(
    recipe: str, plan: str, tmp_path: Path
) -> None:
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank) if plan == "mixed" else None), torch.no_grad():
        got, want = (RECIPES[recipe](m, tmp_path) for m in (bank.compiled, bank.oracle.model))
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


@pytest.mark.breaks
@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ("a prefix for several", "__deepcopy__"),
        ("rows selected", "batch_select_indices"),
        ("rows in another order", "reorder_cache"),
        ("tokens taken back", "crop"),
    ],
)
def test_a_method_that_does_nothing_shows(
    recipe: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The companion."""
    monkeypatch.setattr(SkipCache, method, lambda self, *args: self)
    with pytest.raises((AssertionError, ValueError)):
        test_a_recipe_gives_what_it_gives_with_the_eager_model(recipe, "empty", tmp_path)


# What pickle makes of a cache ------------------------------------------------------------------


def test_a_pickle_is_a_cache_of_transformers_that_anybody_goes_on_with() -> None:
    bank = entry(SHAPE)
    with bank.using(), torch.no_grad():
        cache = _filled(bank.compiled, PREFIX)
        held = pickle.dumps(cache)
        want = bank.oracle.model.generate(**_inputs(PREFIX + "kL"), **GREEDY)
        for model in (bank.compiled, bank.oracle.model):
            other = pickle.loads(held)
            assert type(other) is DynamicCache
            assert other.get_seq_length() == len(PREFIX)
            got = model.generate(**_inputs(PREFIX + "kL"), past_key_values=other, **GREEDY)
            assert torch.equal(got, want)
        assert type(cache) is SkipCache
        assert cache.length == len(PREFIX)


def test_an_empty_one() -> None:
    bank = entry(SHAPE)
    with bank.using():
        again = pickle.loads(pickle.dumps(bank.runtime.new_cache()))
    assert type(again) is DynamicCache
    assert again.get_seq_length() == 0


def test_what_a_plan_has_made_is_not_pickled(tmp_path: Path) -> None:
    """Though it stores all keys and values, they are no others' than the plan's."""
    bank = entry(SHAPE)
    words = r"this cache cannot be pickled, since its keys and values are of a plan; save\(path\)"
    plans = [bank.plan(["0.attention"]), bank.plan(["0.ffn"]), bank.plan([], ["0.ffn"])]
    schedule = Schedule(((0, bank.plan()), (2, bank.plan([], ["1.ffn"]))))
    for decision in (*plans, schedule):
        with bank.using(), torch.no_grad():
            cache = bank.runtime.new_cache(plan=decision)
            bank.compiled(**_inputs(PREFIX), past_key_values=cache, logits_to_keep=1)
            with pytest.raises(TypeError, match=words):
                torch.save(cache, tmp_path / "prefix.pt")
            assert cache.length == len(PREFIX)


def test_states_are_not_pickled() -> None:
    _, compiled = hybrid()
    with pytest.raises(TypeError, match="cannot be pickled, since mixers keep states; save"):
        pickle.dumps(compiled.adaskip.new_cache())


@pytest.mark.breaks
def test_a_pickle_without_tokens_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(cache_module, "as_dynamic_cache", lambda cache: DynamicCache())
    with pytest.raises(AssertionError):
        test_a_pickle_is_a_cache_of_transformers_that_anybody_goes_on_with()
