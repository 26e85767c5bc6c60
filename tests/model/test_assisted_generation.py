"""Drafts that are verified several at once: the tokens of the oracle, decoded one by one.

(The oracle takes several tokens at once for a prompt. So its own assisted generation is what to
compare with only where prompts and decoding skip the same.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.kv_cache.drafting import Drafting
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.phase_split import as_decode
from adaskip_fx.plans.skip_plan import Action
from adaskip_fx.programs.rewrite import plan_phase
from adaskip_fx.runtime import request_step
from adaskip_passes import UnsupportedError
from tests.support.characters import character_tokenizer
from tests.support.compiled_llamas import Entry, entry, fixed, make_model
from tests.support.generation import Collected, counted, mixed_plan, padded
from tests.support.hybrids import hybrid

SHAPE = "grouped"
NEW = 12


@functools.cache
def assistant() -> tuple[Any, Any]:
    """Another model, and the same one compiled."""
    model = make_model("one_layer", seed=5)
    return model, build(model, None, backend="eager")


@functools.cache
def shorter() -> Any:
    """The target itself, compiled with half of it left out."""
    bank = entry(SHAPE)
    return build(bank.model, bank.plan(["1.attention", "1.ffn"]), backend="eager")


#: How drafts are made; the last one's are the target's own.
DRAFTS: Mapping[str, Any] = MappingProxyType(
    {
        "of the prompt": lambda bank: {"prompt_lookup_num_tokens": 3},
        "of an eager model": lambda bank: {"assistant_model": assistant()[0]},
        "of a compiled model": lambda bank: {"assistant_model": assistant()[1]},
        "of the same model with a plan": lambda bank: {"assistant_model": shorter()},
        "that are right": lambda bank: {"assistant_model": bank.model},
    }
)
drafts = pytest.mark.parametrize("kind", DRAFTS)


def prompt(bank: Entry) -> torch.Tensor:
    """Tokens that come again, so that a prompt has drafts."""
    ids = bank.tokens(1, 9, 3)
    return torch.cat((ids, ids[:, :5]), 1)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    torch.manual_seed(1)
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return model.generate(ids, **{"attention_mask": mask, **given, **options})


@drafts
@pytest.mark.parametrize("plan", ["empty", "mixed"])
@pytest.mark.parametrize("memory", [entry, fixed], ids=["views", "static"])
def test_the_tokens_are_those_that_are_decoded_one_by_one(
    kind: str, plan: str, memory: Callable[[str], Entry]
) -> None:
    bank = memory(SHAPE)
    ids = prompt(bank)
    with bank.using(mixed_plan(bank) if plan == "mixed" else None):
        want = generated(bank.oracle.model, ids)
        with counted(bank) as steps:
            got = generated(bank.compiled, ids, **DRAFTS[kind](bank))
    assert torch.equal(got, want)
    assert steps[0] >= 14
    assert max(steps[1:]) <= 7, "a text that was read is not read again"
    assert sum(steps[1:]) > len(steps[1:]), "several drafts were verified at once"


@pytest.mark.breaks
def test_drafts_that_are_verified_as_a_prompt_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(request_step, "as_decode", lambda plan: plan)
    with pytest.raises(AssertionError):
        test_the_tokens_are_those_that_are_decoded_one_by_one("that are right", "mixed", entry)


def test_verified_tokens_run_under_the_plan_for_decoding() -> None:
    bank = entry(SHAPE)
    plan, steps = mixed_plan(bank), []
    (extra,) = (s for s in plan.skipped("decode") if s not in plan.prefill)
    with bank.using(plan):
        bank.runtime.observer = lambda program, plan, tokens: steps.append(
            (tokens, plan.action(plan_phase(program.captured.key.phase), extra))
        )
        try:
            got = generated(
                bank.compiled,
                prompt(bank),
                assistant_model=bank.model,
                return_dict_in_generate=True,
            )
        finally:
            bank.runtime.observer = None
    assert steps[0] == (14, Action.RUN)
    assert {action for _, action in steps[1:]} == {Action.SKIP}
    assert max(tokens for tokens, _ in steps[1:]) > 1
    assert got.past_key_values.request.decoding_from == 14, "all of it is one turn"
    assert got.past_key_values.get_seq_length() == 14 + NEW - 1


def test_the_half_of_a_plan_that_decodes() -> None:
    bank = entry(SHAPE)
    plan = mixed_plan(bank)
    half = as_decode(plan)
    assert half.prefill == half.decode == plan.decode
    assert as_decode(half) is half
    assert half.surrogates == plan.surrogates


def test_each_part_is_compared_with_the_eager_model_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    bank = entry(SHAPE)
    before = bank.runtime.checker.compared
    with bank.using(mixed_plan(bank)):
        got = generated(bank.compiled, prompt(bank), assistant_model=bank.model)
        want = generated(bank.oracle.model, prompt(bank))
    assert torch.equal(got, want)
    assert bank.runtime.checker.compared - before >= 4


@pytest.mark.parametrize("ahead", [False, True])
def test_sampling_is_that_of_the_eager_model(ahead: bool) -> None:
    """Drafts are accepted with the same random numbers."""
    bank = entry(SHAPE)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    before = bank.runtime.ahead
    with bank.using(bank.plan(["0.ffn"])):
        bank.runtime.ahead = ahead
        try:
            for kind in ("of an eager model", "of the prompt"):
                got, want = (
                    generated(model, prompt(bank), **options, **DRAFTS[kind](bank))
                    for model in (bank.compiled, bank.oracle.model)
                )
                assert torch.equal(got, want)
        finally:
            bank.runtime.ahead = before


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind.endswith("plan") else kind
        for kind in DRAFTS
    ],
)
def test_a_padded_row(kind: str) -> None:
    bank = entry(SHAPE)
    ids, mask, _ = padded(bank)
    with bank.using(mixed_plan(bank)):
        want = generated(bank.oracle.model, ids[1:], attention_mask=mask[1:])
        got = generated(bank.compiled, ids[1:], attention_mask=mask[1:], **DRAFTS[kind](bank))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("kind", "whole"),  # of the new tokens alone a drafting model would not know the beginning
    [*((kind, True) for kind in DRAFTS), ("of the prompt", False)],
)
def test_a_text_of_which_the_beginning_is_stored(kind: str, whole: bool) -> None:
    """Of the whole text what is stored is not read again (as transformers 5.23 does)."""
    if not whole and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers cuts the mask to the new tokens, which is refused")
    bank = entry(SHAPE)
    ids = prompt(bank)
    with bank.using(mixed_plan(bank)), torch.no_grad():
        want = generated(bank.oracle.model, ids)
        cache = bank.runtime.new_cache()
        bank.compiled(ids[:, :9], past_key_values=cache, logits_to_keep=1)
        given = {"past_key_values": cache, "attention_mask": torch.ones_like(ids)}
        with counted(bank) as steps:
            text = ids if whole else ids[:, 9:]
            got = generated(bank.compiled, text, **given, **DRAFTS[kind](bank))
    assert torch.equal(got[:, -NEW:], want[:, -NEW:])
    assert 5 <= steps[0] <= 5 + 20
    assert cache.get_seq_length() == 14 + NEW - 1
    assert cache.drafting is None


def test_the_next_turn_is_a_prompt_again() -> None:
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)):
        said, cache = {}, {}
        for model in (bank.compiled, bank.oracle.model):
            lookup = {"prompt_lookup_num_tokens": 3} if model is bank.compiled else {}
            first = generated(model, prompt(bank), return_dict_in_generate=True, **lookup)
            cache[model] = first.past_key_values
            text = torch.cat((first.sequences, bank.tokens(1, 3, 8)), 1)
            said[model] = generated(model, text, past_key_values=cache[model], **lookup)
    assert torch.equal(*said.values())


def test_all_that_is_returned_and_streamed() -> None:
    bank = entry(SHAPE)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    streams = [Collected(), Collected()]
    with bank.using(bank.plan(["0.ffn"])):
        got, want = (
            generated(model, prompt(bank), streamer=stream, prompt_lookup_num_tokens=3, **asked)
            for model, stream in zip((bank.compiled, bank.oracle.model), streams, strict=True)
        )
    assert torch.equal(got.sequences, want.sequences)
    assert streams[0].tokens == streams[1].tokens == got.sequences[0].tolist()
    for kind in ("scores", "logits"):
        for mine, theirs in zip(getattr(got, kind), getattr(want, kind), strict=True):
            torch.testing.assert_close(mine, theirs)


# What else may be asked for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"eos_token_id": 34}, {"max_new_tokens": 1}, {"min_new_tokens": 6, "eos_token_id": 34}],
)
@drafts
def test_where_it_ends(kind: str, options: dict[str, Any]) -> None:
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)):
        want = generated(bank.oracle.model, prompt(bank), **options)
        got = generated(bank.compiled, prompt(bank), **options, **DRAFTS[kind](bank))
    assert torch.equal(got, want)


def test_a_schedule_gives_each_token_its_plan() -> None:
    bank = entry(SHAPE)
    plans = bank.plan(["0.ffn"]), bank.plan(["0.ffn"], ["1.ffn"])
    schedule = Schedule(((0, plans[0]), (3, plans[1])))
    with bank.using():
        caches = [bank.runtime.new_cache(plan=schedule) for _ in range(2)]
        one_by_one = generated(bank.compiled, prompt(bank), past_key_values=caches[0])
        drafted = generated(
            bank.compiled, prompt(bank), past_key_values=caches[1], assistant_model=bank.model
        )
    assert torch.equal(drafted, one_by_one)


def _of_another_vocabulary() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("drafting", ["eager", "compiled"])
def test_another_tokenizer(drafting: str) -> None:
    bank, small = entry(SHAPE), _of_another_vocabulary()
    if drafting == "compiled":
        small = build(small, None, backend="eager")
    one, other = character_tokenizer(), character_tokenizer()
    other.add_tokens(["zz"])
    asked = {"assistant_model": small, "tokenizer": one, "assistant_tokenizer": other}
    ids = prompt(bank).clamp(2, 50)
    with bank.using(mixed_plan(bank)):
        want = generated(bank.oracle.model, ids)
        got = generated(bank.compiled, ids, **asked)
        assert torch.equal(got, want)
        if drafting == "compiled":  # transformers puts another head on it to sample
            with pytest.raises(UnsupportedError, match="and does not run as it is now"):
                generated(bank.compiled, ids, do_sample=True, **asked)


# A compiled model that drafts -------------------------------------------------------------------


@contextmanager
def assistant_steps() -> Iterator[list[tuple[int, str]]]:
    """Tokens and the plan's phase of each step of the compiled assistant."""
    runtime, steps = runtime_of(assistant()[1]), []
    before = runtime.plan
    runtime.plan = bank_plan = entry("one_layer").plan([], ["0.ffn"])
    extra = bank_plan.skipped("decode")[0]
    runtime.observer = lambda program, plan, tokens: steps.append(
        (tokens, plan.action(plan_phase(program.captured.key.phase), extra).value)
    )
    try:
        yield steps
    finally:
        runtime.plan, runtime.observer = before, None


def test_whoever_drafts_reads_the_prompt_once_and_decodes_after_it() -> None:
    bank = entry(SHAPE)
    with assistant_steps() as steps:
        want = generated(bank.model, prompt(bank))
        got = generated(bank.model, prompt(bank), assistant_model=assistant()[1])
    assert torch.equal(got, want)
    assert steps[0] == (14, "run")
    again = [tokens for tokens, action in steps[1:] if action == "run"]
    assert sum(again) <= 1, "at most the prompt's last token is taken back once"
    assert max(tokens for tokens, _ in steps[1:]) <= 2


@pytest.mark.breaks
def test_a_drafter_that_takes_each_round_for_a_prompt_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The companion."""
    monkeypatch.setattr(
        type(assistant()[1]),
        "_adaskip_prompt",
        lambda self, ids, config, kwargs: kwargs[self._adaskip.generate_argument].prompt(),
    )
    with pytest.raises(AssertionError):
        test_whoever_drafts_reads_the_prompt_once_and_decodes_after_it()


# Refusals, and what they leave behind -----------------------------------------------------------


def test_a_mixers_state_cannot_be_drafted_for() -> None:
    _, compiled = hybrid()
    ids = torch.arange(1, 9).unsqueeze(0)
    with pytest.raises((NotImplementedError, ValueError), match=r"cannot forget|stateful models"):
        compiled.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4, do_sample=False)


def test_a_step_that_fails_in_the_middle_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = entry(SHAPE)
    with bank.using(mixed_plan(bank)), torch.no_grad():
        cache = bank.runtime.new_cache()
        bank.compiled(prompt(bank), past_key_values=cache, logits_to_keep=1)
        cache.drafting = Drafting(17)
        run, calls = request_step._run, []

        def fails(*args: Any) -> torch.Tensor:
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("no more")
            return run(*args)

        monkeypatch.setattr(request_step, "_run", fails)
        with pytest.raises(RuntimeError, match="no more"):
            bank.compiled(bank.tokens(1, 6), past_key_values=cache, logits_to_keep=1)
    assert len(calls) == 2
    assert cache.length == 14


@pytest.mark.parametrize("keep", [0, 1, 2, 5, torch.tensor([0, 4, 5])])
def test_any_logits_of_a_step_in_parts(keep: int | torch.Tensor) -> None:
    bank = entry(SHAPE)
    plan = bank.plan(["0.ffn"])  # in both phases, so that the parts are as the whole
    with bank.using(plan), torch.no_grad():
        logits = []
        for drafting in (None, Drafting(17)):
            cache = bank.runtime.new_cache()
            bank.compiled(prompt(bank), past_key_values=cache, logits_to_keep=1)
            cache.drafting = drafting
            out = bank.compiled(bank.tokens(1, 6), past_key_values=cache, logits_to_keep=keep)
            logits.append(out.logits)
    torch.testing.assert_close(*logits)
