"""What steps on views repeat is looked up once, and again where a step is another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from adaskip_fx.capture.state import ChangedError
from adaskip_fx.programs.instruments import ResidualRecorder
from adaskip_fx.programs.program_cache import Graphs
from adaskip_fx.runtime.view_binding import ViewBinding
from tests.support.compiled_llamas import Entry, check_request, entry, follow, make_model
from tests.support.eager_reference import assert_close

SHAPE = "grouped"


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases of the steps whose program was looked up."""
    phases, program = list[str](), Graphs.program

    def counted(self: Graphs, key: Any, *args: Any) -> Any:
        phases.append(key.phase)
        return program(self, key, *args)

    monkeypatch.setattr(Graphs, "program", counted)
    return phases


@contextmanager
def request(bank: Entry) -> Iterator[Any]:
    """A request with a prompt of five tokens, and a function that checks its next step."""
    cache, reference = bank.runtime.new_cache(), bank.reference_cache()

    def step(tokens: int) -> Any:
        ids = bank.tokens(1, tokens, seed=cache.length)
        got = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
        assert_close(got, bank.oracle.step(ids, reference)[:, -1:], bank.tolerance)
        return cache

    with torch.no_grad():
        step(5)
        yield step


def test_decode_steps_of_a_turn_look_up_once(looked_up: list[str]) -> None:
    bank = entry(SHAPE)
    with bank.using(), request(bank) as step:
        for tokens in (1, 1, 1, 3, 3, 1, 1):
            step(tokens)
    assert looked_up == ["prefill", "decode", "extend", "decode"]


def test_another_plan_is_looked_up(looked_up: list[str]) -> None:
    bank = entry(SHAPE)
    plan = bank.plan(decode_extra=["0.ffn"])
    with bank.using(), request(bank) as step:
        cache = step(1)
        cache.request.decode_with(plan)
        follow(bank.oracle, plan)
        step(1)
        step(1)
    assert looked_up == ["prefill", "decode", "decode"]


def test_a_plan_that_is_not_looked_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: the binding of another plan serves."""
    bank = entry(SHAPE)
    monkeypatch.setattr(ViewBinding, "serves", lambda self, form, *_: self.form == form)
    with bank.using(), request(bank) as step:
        cache = step(1)
        cache.request.decode_with(plan := bank.plan(decode_extra=["0.ffn"]))
        follow(bank.oracle, plan)
        with pytest.raises(AssertionError):
            step(1)


def test_an_instrument_is_looked_up(looked_up: list[str]) -> None:
    bank = entry(SHAPE)
    with bank.using(), request(bank) as step:
        cache = step(1)
        cache.request.instrument = recorder = ResidualRecorder()
        step(1)
        assert len(recorder.streams) == 1 + len(bank.sublayers)
        cache.request.instrument = None
        step(1)
    assert looked_up == ["prefill", "decode", "decode", "decode"]


def test_weights_of_another_dtype_are_refused() -> None:
    """`to` exchanges what is in the weights that the binding has."""
    from adaskip_fx.api import build

    model = make_model(SHAPE)
    compiled = build(model, None, backend="eager")
    with torch.no_grad():
        cache = compiled(torch.ones(1, 5, dtype=torch.int64)).past_key_values
        token = torch.ones(1, 1, dtype=torch.int64)
        for _ in range(2):
            compiled(token, past_key_values=cache)
        model.to(torch.bfloat16)
        with pytest.raises(ChangedError, match="was changed since this request began"):
            compiled(token, past_key_values=cache)


def test_growth_goes_on_with_the_same_binding(looked_up: list[str]) -> None:
    bank = entry("one_layer")
    with bank.using():
        check_request(bank, bank.plan(), (250, *[1] * 12), keep=1)
    assert looked_up == ["prefill", "decode"]
