"""Ways to call a compiled model, beside one another: embeddings and drafts, beams and checks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from adaskip_fx import AdaSkip
from adaskip_fx.kv_cache.drafting import Drafting
from adaskip_fx.model import loss
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_passes._torch import one_at_a_time
from tests.support.compiled_llamas import entry, profile_of
from tests.support.generation import mixed_plan

BANK = entry("grouped")
IDS = BANK.tokens(1, 9, 3)
IDS = torch.cat((IDS, IDS[:, :5]), 1)  # something to look up


def generate(**options: Any) -> torch.Tensor:
    usual = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens: torch.Tensor = BANK.compiled.generate(
        attention_mask=torch.ones_like(IDS), **{**usual, **options}
    )
    return tokens


def test_drafts_after_a_prompt_of_embeddings() -> None:
    """Its tokens are a prompt's, though there are no ids of them."""
    prompt = BANK.model.get_input_embeddings()(IDS).detach()
    with BANK.using(mixed_plan(BANK)):
        alone = generate(inputs_embeds=prompt)
        drafted = generate(inputs_embeds=prompt, prompt_lookup_num_tokens=3)
        assert torch.equal(alone, drafted)
        assert torch.equal(alone, generate(input_ids=IDS)[:, IDS.shape[1] :])


def test_beams_while_steps_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows change places: what runs beside them is of other rows then, and is not compared."""
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    with BANK.using(mixed_plan(BANK)):
        found = generate(input_ids=IDS, num_beams=3, num_return_sequences=2)
        compared = BANK.runtime.checker.compared
        generate(input_ids=IDS)
        assert BANK.runtime.checker.compared > compared, "what keeps its rows is compared"
    assert found.shape[0] == 2


def test_drafts_end_with_their_call() -> None:
    """Also of a cache that took the first one's place in it."""
    cache, drafting = BANK.compiled.adaskip.new_cache(), Drafting(4)
    with cache.verifying(drafting):
        other = cache.new_request()
        assert other.drafting is None, "it has a text of its own"
        other.drafting = drafting
    assert cache.drafting is None
    with torch.no_grad(), BANK.using(mixed_plan(BANK)):
        fresh = BANK.compiled.adaskip.new_cache()
        wanted = BANK.compiled(input_ids=IDS, past_key_values=fresh).logits
        other = BANK.compiled.adaskip.new_cache()
        other.drafting = drafting
        got = BANK.compiled(input_ids=IDS, past_key_values=other).logits
        drafting.ended = False
        decoded = BANK.compiled.adaskip.new_cache()
        decoded.drafting = drafting
        wrong = BANK.compiled(input_ids=IDS, past_key_values=decoded).logits
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(wrong, wanted, atol=1e-3), "the companion: it would show"


def test_the_proof_of_a_loss_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has another attention meanwhile, which other threads must not see."""
    graphs, held = BANK.runtime.graphs, list[bool]()
    original = type(graphs.states.original)
    real = original.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        held.append(one_at_a_time._is_owned())  # type: ignore[attr-defined]
        return real(*args, **kwargs)

    state = graphs.states.current
    monkeypatch.setattr(original, "forward", forward)
    monkeypatch.setattr(loss, "forward_names", lambda _: frozenset({"labels", "use_cache"}))
    assert loss._is_own_loss(BANK.compiled, state, IDS, {})
    assert held == [True]


def test_labels_that_fail_teach_nothing() -> None:
    similarity = {str(s): 0.5 for s in BANK.sublayers}
    plan = BANK.plan(["1.ffn"])
    with torch.no_grad(), BANK.using(plan, AdaSkip(window=4), profile_of(BANK, similarity)):
        cache = BANK.compiled.adaskip.new_cache()
        BANK.compiled(input_ids=IDS, past_key_values=cache)
        BANK.compiled(input_ids=IDS[:, :1], past_key_values=cache)
        before, length = cache.request.window.steps, cache.length
        for _ in range(3):
            with pytest.raises(ValueError, match="size"):
                BANK.compiled(input_ids=IDS[:, :1], labels=IDS[:, :3], past_key_values=cache)
        assert (cache.request.window.steps, cache.length) == (before, length)
        BANK.compiled(input_ids=IDS[:, :1], past_key_values=cache)
        assert cache.request.window.steps == before + 1 == 2


def test_what_a_plan_has_decoded_is_not_pickled_after_another_turn() -> None:
    cache = BANK.compiled.adaskip.new_cache(plan=SkipPlan.empty(BANK.sublayers))
    with torch.no_grad():
        BANK.compiled(input_ids=IDS, past_key_values=cache)
        pickle.dumps(cache)
        cache.request.decode_with(BANK.plan(["0.ffn"]))
        BANK.compiled(input_ids=IDS[:, :1], past_key_values=cache)
        BANK.compiled(input_ids=IDS, past_key_values=cache)
    with pytest.raises(TypeError, match="its keys and values are of a plan"):
        pickle.dumps(cache)
