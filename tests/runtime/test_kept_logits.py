"""`logits_to_keep` of every kind: the eager model's logits, and one graph besides the last token's.

The eager model is asked with the same value, so it says what a number or a tensor means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.capture.arguments import takes_indices
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.kept_logits import KeptLogits
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import entry, make_model
from tests.support.eager_reference import assert_close
from tests.support.families.all import tiny_config, tiny_model

NUMBERS = (0, *range(2, 20), 40, -3, -40)
INDICES: dict[str, Any] = {
    "in order": [2, 3, 7],
    "any order, repeated": [8, 0, 3, 3],
    "from the end": [-1, -9, 4],
    "every token twice": [*range(9), *range(9)],
    "one": [4],
    "the last": [8],
    "none": [],
    "a mask": [True, False, True, True, False, False, False, False, True],
    "a mask of one": [False, False, True, False, False, False, False, False, False],
    "a mask of none": [False] * 9,
}
#: of what is run: rows, tokens stored before, and whether rows are padded
STEPS = {"prompt": (1, 0, False), "chunk": (2, 6, False), "padded": (2, 0, True)}


class Pair:
    """A model, and the same compiled."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.compiled = build(model, None, backend="eager")

    @property
    def captures(self) -> int:
        count: int = self.compiled.adaskip.stats().captures
        return count

    def check(self, keep: Any, tokens: int = 9, step: str = "prompt") -> None:
        """Compare a step with the eager model's; AssertionError on a difference."""
        rows, past, padded = STEPS[step]
        expected = _logits(self.model, keep, rows, past, tokens, padded, DynamicCache())
        mine = self.compiled.adaskip.new_cache()
        got = _logits(self.compiled, keep, rows, past, tokens, padded, mine)
        same(got, expected, f"logits of {keep}")


def same(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    if expected.numel():
        assert_close(got, expected, 1e-5, what)


@torch.no_grad()
def _logits(
    model: Any, keep: Any, rows: int, past: int, tokens: int, padded: bool, cache: Any
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, 50, (rows, past + tokens), generator=generator)
    more: dict[str, Any] = {"past_key_values": cache}
    if past:
        model(ids[:, :past], logits_to_keep=1, **more)
    if padded:
        mask = torch.ones(rows, tokens, dtype=torch.int64)
        mask[0, :1] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        more |= {"attention_mask": mask, "position_ids": positions}
    logits: torch.Tensor = model(ids[:, past:], logits_to_keep=keep, **more).logits
    return logits[1:] if padded else logits  # (the padding's own logits mean nothing)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(make_model())


def test_a_prompt_of_the_last_token_alone_needs_no_other_graph(pair: Pair) -> None:
    before = pair.captures
    for tokens in (2, 3, 9):
        pair.check(1, tokens)
    assert pair.captures == before


@pytest.mark.parametrize("step", STEPS)
def test_all_numbers_are_one_graph(pair: Pair, step: str) -> None:
    before = pair.captures
    for tokens in (2, 3, 9, 20):
        pair.check(1, tokens, step)
    with_the_last = pair.captures
    assert with_the_last - before <= 2  # (a chunk comes after a prompt of its own)
    for keep in NUMBERS:
        for tokens in (2, 3, 9, 20):
            pair.check(keep, tokens, step)
    packed = step == "padded"  # there the rows' last tokens are indices as well
    assert pair.captures == with_the_last + (not packed)


@pytest.mark.parametrize("kind", INDICES)
def test_indices(pair: Pair, kind: str) -> None:
    pair.check(0)
    before = pair.captures
    pair.check(torch.tensor(INDICES[kind], dtype=None if INDICES[kind] else torch.int64))
    assert pair.captures == before


@pytest.mark.parametrize("step", ["chunk", "padded"])
def test_indices_of_other_steps(pair: Pair, step: str) -> None:
    for indices in ([8, 0, -2, 0], [3]):
        pair.check(torch.tensor(indices, dtype=torch.int32), step=step)


@pytest.mark.parametrize("step", STEPS)
def test_indices_of_one_new_token(pair: Pair, step: str) -> None:
    """A graph of one token gives its logits alone, and so does a decode step's."""
    for indices in ([0], [-1, 0, 0], []):
        pair.check(torch.tensor(indices, dtype=torch.int64), 1, step)
    for keep in (0, 1, 2, -1):
        pair.check(keep, 1, step)


@pytest.mark.breaks
@pytest.mark.parametrize("keep", [3, [8, 0, 3]], ids=str)
def test_other_tokens_are_found(pair: Pair, monkeypatch: pytest.MonkeyPatch, keep: Any) -> None:
    """The companion: the logits of these tokens in another order."""
    monkeypatch.setattr(KeptLogits, "of", lambda _, logits: logits.flip(1))
    with pytest.raises(AssertionError, match="logits of"):
        pair.check(torch.tensor(keep) if isinstance(keep, list) else keep)


def test_another_graph_is_counted() -> None:
    """The companion: captures are seen where there are any."""
    fresh = Pair(make_model("one_layer"))
    before = fresh.captures
    fresh.check(2)
    assert fresh.captures == before + 1
    fresh.check(2, step="padded")
    assert fresh.captures == before + 2


@pytest.mark.parametrize("skipped", [[], ["0.ffn"]], ids=["nothing", "skipped"])
@pytest.mark.parametrize("keep", [0, 1, 2, 4, 40, -3, [8, 0, 3, 3, -1], [8], []], ids=str)
def test_the_last_token_in_full(keep: Any, skipped: list[str]) -> None:
    """It runs with the decode plan, which is another graph's step."""
    bank = entry("grouped")
    plan = bank.plan(skipped)
    full = replace(plan, decode=SkipPlan.empty(plan.sublayers).decode, last_token_full=True)
    wanted = torch.tensor(keep, dtype=torch.int64) if isinstance(keep, list) else keep
    ids, reference = bank.tokens(1, 9), bank.reference_cache()
    with bank.using(full), torch.no_grad():
        got = bank.compiled(ids, logits_to_keep=wanted).logits
        head = bank.oracle.step(ids[:, :-1], reference)
        whole = torch.cat((head, bank.oracle.step(ids[:, -1:], reference)), 1)
    by_index = isinstance(wanted, torch.Tensor)
    same(got, whole[:, wanted if by_index else slice(-wanted, None)], f"logits of {keep}")


def test_every_step_is_checked_against_the_tokens_asked_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    for keep in (torch.tensor([5, 0, 0]), torch.tensor([], dtype=torch.int64), 3, 0):
        pair.check(keep)


def test_states_and_tokens_by_index() -> None:
    """A model without attention, and a cache of another name."""
    model = tiny_model(tiny_config("mamba", num_hidden_layers=1))
    compiled, ids = build(model, None, backend="eager"), torch.arange(3, 12).unsqueeze(0)
    before = compiled.adaskip.stats().captures
    for keep in (0, 2, 5, 40, torch.tensor([8, 0, 3, 3])):
        with torch.no_grad():
            got, expected = (m(ids, logits_to_keep=keep).logits for m in (compiled, model))
        same(got, expected, f"logits of {keep}")
    assert compiled.adaskip.stats().captures == before + 1


# Forwards of other kinds ------------------------------------------------------------------------


class Counts(LlamaForCausalLM):  # type: ignore[misc]
    """Takes a number alone."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep: int = 0,
    ):
        assert isinstance(logits_to_keep, int)
        return super().forward(
            *(input_ids, attention_mask, position_ids, past_key_values),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


class Tails(LlamaForCausalLM):  # type: ignore[misc]
    """Says that it takes indices, and gives as many logits of the last tokens."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep: int | torch.Tensor = 0,
    ):
        if isinstance(logits_to_keep, torch.Tensor):
            logits_to_keep = logits_to_keep.sort().values
        return super().forward(
            *(input_ids, attention_mask, position_ids, past_key_values),
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
        )


class Silent(LlamaForCausalLM):  # type: ignore[misc]
    """Cannot be asked: all logits are given always."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        **kwargs,
    ):
        return super().forward(
            *(input_ids, attention_mask, position_ids, past_key_values), use_cache=use_cache
        )


def of_class(kind: Callable[..., Any]) -> Any:
    plain = make_model("one_layer")
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def test_a_forward_that_takes_a_number_alone() -> None:
    """It is asked for all logits, and the others are cut off."""
    pair = Pair(of_class(Counts))
    plain = make_model("one_layer")
    before = pair.captures
    for keep in NUMBERS:
        pair.check(keep)
    pair.check(1)
    pair.model = plain
    for kind in INDICES.values():
        pair.check(torch.tensor(kind, dtype=None if kind else torch.int64))
    assert pair.captures == before + 1


def test_a_forward_that_cannot_be_asked() -> None:
    pair = Pair(of_class(Silent))
    before = pair.captures
    for keep in (0, 1, 2, 19, torch.tensor([3, 1])):
        pair.check(keep)
    assert pair.captures == before


def test_which_forward_takes_indices() -> None:
    kinds = {LlamaForCausalLM: True, Tails: True, Counts: False, Silent: False}
    assert {kind: takes_indices(kind.forward) for kind in kinds} == kinds


def test_a_graph_that_takes_no_heed_of_the_order_is_refused() -> None:
    """The companion of the check on capture: in order, these would be the right tokens."""
    compiled = build(of_class(Tails), None, backend="eager")
    with torch.no_grad():
        compiled(torch.arange(3, 12).unsqueeze(0), logits_to_keep=1)
        with pytest.raises(UnsupportedError, match="prefill gives other logits than the model"):
            compiled(torch.arange(3, 12).unsqueeze(0), logits_to_keep=2)
