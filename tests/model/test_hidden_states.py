"""Hidden states of a compiled model are the eager model's; with a plan, those of the oracle.

The eager model is asked for them by itself: transformers' own hooks record them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.programs.instruments import HiddenStateRecorder
from tests.support.compiled_families import compiled_family
from tests.support.compiled_llamas import Entry, entry, fixed, make_model
from tests.support.eager_reference import assert_close
from tests.support.families.all import tiny_config, tiny_model

FAMILIES = (
    "gpt_neox",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gemma2", "mixtral")),
)
IDS = torch.tensor([[5, 9, 3, 22, 41, 8, 17, 2, 30], [4, 4, 31, 7, 50, 12, 6, 1, 19]])
LEFT = torch.ones_like(IDS).index_put((torch.tensor([0]), torch.arange(3)), torch.tensor(0))
CASES: dict[str, dict[str, Any]] = {
    "a prompt": {},
    "of all tokens, whatever is kept": {"logits_to_keep": 1},
    "padded on the left": {"attention_mask": LEFT},
    "padded on the right": {"attention_mask": LEFT.flip(1)},
    "no cache": {"use_cache": False},
    "one token": {"input_ids": IDS[:, :1]},
    "with labels": {"labels": IDS},
}


def same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], what: str = "") -> None:
    """AssertionError that names the first hidden state which is another."""
    assert len(got) == len(want), what
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_close(one, other, 1e-5, f"{what}hidden state {i}")


class Pair:
    """A model, and the same compiled."""

    def __init__(self, model: Any, compiled: Any = None) -> None:
        self.model, self.compiled = model, compiled or build(model, None, backend="eager")

    @torch.no_grad()
    def check(self, **arguments: Any) -> None:
        """Compare a call with the eager model's; AssertionError on a difference."""
        given = {"input_ids": IDS, "output_hidden_states": True, **arguments}
        got, want = self.compiled(**given), self.model(**given)
        same(got.hidden_states, want.hidden_states)
        assert_close(got.logits[-1:], want.logits[-1:], 1e-5, "logits")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*compiled_family(request.param))


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_models_own(pair: Pair, case: str) -> None:
    pair.check(**CASES[case])


def test_a_tuple_ends_with_them(pair: Pair) -> None:
    given = {"output_hidden_states": True, "return_dict": False, "use_cache": False}
    with torch.no_grad():
        got, want = pair.compiled(IDS, **given), pair.model(IDS, **given)
    assert len(got) == len(want) == 2
    same(got[1], want[1])


@pytest.mark.parametrize("mask", [None, LEFT], ids=["", "padded"])
def test_generate_returns_them_of_every_step(pair: Pair, mask: torch.Tensor | None) -> None:
    options = {
        "attention_mask": mask if mask is not None else torch.ones_like(IDS),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_hidden_states": True,
    }
    got, want = pair.compiled.generate(IDS, **options), pair.model.generate(IDS, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for i, (one, other) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        same(one, other, f"step {i}, ")


def test_linked_as_one_graph() -> None:
    model = make_model("grouped")
    Pair(model, build(model, None, backend="eager", link="fused")).check()


# Under a plan -----------------------------------------------------------------------------------

FACTORS = {"0.ffn": 1.3, "1.attention": 0.8, "1.ffn": 1.1, "2.attention": 0.9}
PLANS: dict[str, tuple[list[str], dict[str, float]]] = {
    "nothing": ([], {}),
    "one": (["1.ffn"], {}),
    "a layer": (["1.attention", "1.ffn"], {}),
    "the first and the last": (["0.attention", "2.ffn"], {}),
    "neighbours with factors": (["0.ffn", "1.attention", "1.ffn", "2.attention"], FACTORS),
}


def stepped(
    bank: Entry, ids: torch.Tensor, cache: Any, reference: Any, **more: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Hidden states of a step, of the compiled model and of the oracle."""
    got = bank.compiled(ids, past_key_values=cache, output_hidden_states=True, **more)
    want = bank.oracle.model(ids, past_key_values=reference, output_hidden_states=True, **more)
    return got.hidden_states, want.hidden_states


@pytest.mark.parametrize("bank_of", [entry, fixed])
@pytest.mark.parametrize("case", PLANS)
def test_of_what_is_skipped_the_stream_is_as_it_is_there(
    case: str, bank_of: Callable[[str], Entry]
) -> None:
    """Also of decode steps that work on whole buffers otherwise."""
    bank, (skipped, factors) = bank_of("three_layers"), PLANS[case]
    with bank.using(bank.plan(skipped, ["2.ffn"], factors=factors)), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for ids in (IDS[:1, :5], IDS[:1, 5:6], IDS[:1, 6:7], IDS[:1, 7:]):
            same(*stepped(bank, ids, cache, reference), f"{ids.shape[1]} tokens, ")
            if ids.shape[1] == 1:  # a step between that nobody asks for hidden states of
                bank.compiled(ids, past_key_values=cache)
                bank.oracle.model(ids, past_key_values=reference)
        if skipped:  # the companion: what is skipped is seen
            plain = bank.model(IDS[:1], output_hidden_states=True).hidden_states
            planned = bank.compiled(IDS[:1], output_hidden_states=True).hidden_states
            with pytest.raises(AssertionError, match="hidden state"):
                same(planned, plain)


def test_the_last_token_in_full() -> None:
    """It runs with the decode plan, so that a prompt is two steps."""
    bank = entry("grouped")
    plan = bank.plan(["0.ffn"])
    full = replace(plan, decode=SkipPlan.empty(plan.sublayers).decode, last_token_full=True)
    with bank.using(full), torch.no_grad():
        got = bank.compiled(IDS[:1], output_hidden_states=True).hidden_states
        reference = bank.reference_cache()
        given = {"past_key_values": reference, "output_hidden_states": True}
        parts = [
            bank.oracle.model(ids, **given).hidden_states for ids in (IDS[:1, :-1], IDS[:1, -1:])
        ]
    same(got, tuple(torch.cat(pair, 1) for pair in zip(*parts, strict=True)))


# Nobody else is touched -------------------------------------------------------------------------


def test_a_call_that_asks_for_none_has_nothing_of_it() -> None:
    pair = Pair(make_model("one_layer"))
    with torch.no_grad():
        pair.compiled(IDS[:1], logits_to_keep=1)
        before = pair.compiled.adaskip.stats()
        output = pair.compiled(IDS[:1], logits_to_keep=1, output_hidden_states=True)
        asked = pair.compiled.adaskip.stats()
        cache = output.past_key_values
        assert cache.request.instrument is None
        assert pair.compiled(IDS[:1, :1], past_key_values=cache).hidden_states is None
        pair.compiled(IDS[:1], logits_to_keep=1)
        after = pair.compiled.adaskip.stats()
    assert asked.captures == before.captures, "the graph is the one that is there"
    assert (asked.links, asked.pieces_compiled) == (before.links + 1, before.pieces_compiled + 1)
    assert after.pieces_compiled - asked.pieces_compiled <= 5, "a decode step's own"


def test_the_original_may_be_asked_as_well() -> None:
    """transformers leaves hooks on its modules, which change nothing."""
    pair = Pair(make_model("one_layer"))
    with torch.no_grad():
        cache = pair.compiled(IDS[:1, :4]).past_key_values
        pair.model(IDS, output_hidden_states=True)
        assert any(m._forward_hooks for m in pair.model.modules()), "what this is about"
        for ids in (IDS[:1, 4:5], IDS[:1, 5:]):
            got = pair.compiled(ids, past_key_values=cache).logits
        assert_close(got, pair.model(IDS[:1]).logits[:, 5:], 1e-5, "logits")
        pair.check()
        pair.model.model.layers[0].register_forward_hook(lambda m, a, out: out * 2.0)
        with pytest.raises(Exception, match="of the original model was changed"):  # the companion
            pair.compiled(IDS)


def test_a_model_that_was_asked_before_it_was_compiled() -> None:
    model = make_model("one_layer")
    with torch.no_grad():
        model(IDS, output_hidden_states=True)
    Pair(model).check()


# What is refused --------------------------------------------------------------------------------


def test_hidden_states_of_another_kind_are_refused() -> None:
    """Mamba's are not the stream."""
    model = tiny_model(tiny_config("mamba"))
    pair = Pair(model)
    message = (
        "MambaForCausalLM gives no hidden states, or others than its residual stream between "
        r"layers, so forward\(output_hidden_states=...\) is not supported by adaskip_fx yet; call"
    )
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        pair.compiled(IDS, output_hidden_states=True)
    with torch.no_grad():
        assert_close(pair.compiled(IDS).logits, model(IDS).logits, 1e-5, "logits")


def test_hidden_states_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion of the proof on a few tokens: it compares."""
    monkeypatch.setattr(HiddenStateRecorder, "states", property(lambda self: self._parts[0][::-1]))
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM gives no hidden states, or"):
        Pair(make_model("one_layer")).check()


def test_some_of_them_by_number_are_refused() -> None:
    bank = entry("grouped")
    with bank.using(), torch.no_grad():
        for asked in (2, [0, -1]):
            with pytest.raises(NotImplementedError, match=r"forward\(output_hidden_states=...\)"):
                bank.compiled(IDS, output_hidden_states=asked)
