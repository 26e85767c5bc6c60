"""``ADASKIP_CHECK=1`` compares real requests with the eager model, under the plan in force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adaskip_fx.plans import decisions
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.programs.program import Program
from adaskip_fx.runtime.checking import CheckError
from tests.support.compiled_llamas import Cell, Entry

CELL = Cell("grouped")
IDS = torch.arange(3, 15).unsqueeze(0)
TOKEN = IDS[:, :1]


@pytest.fixture
def bank(monkeypatch: pytest.MonkeyPatch) -> Entry:
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    entry = CELL.entry()
    checker = entry.runtime.checker
    checker.worst, checker.compared = None, 0
    return entry


def request(compiled: Any, *pieces: torch.Tensor, **first: Any) -> Any:
    cache = compiled.adaskip.new_cache()
    with torch.no_grad():
        for number, ids in enumerate(pieces):
            more = first if not number else {}
            compiled(ids, past_key_values=cache, logits_to_keep=1, **more)
    return cache


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"skip": ["0.attention", "1.ffn"], "factors": {"1.ffn": 0.5}},
        {"decode_extra": ["0.ffn"]},
    ],
    ids=["nothing", "skipped", "in decoding"],
)
def test_prompts_pieces_and_steps_are_compared(bank: Entry, plan: dict[str, Any]) -> None:
    with bank.using(bank.plan(**plan)) as compiled:
        request(compiled, IDS, TOKEN, TOKEN, IDS[:, :4], TOKEN)
        checker = bank.runtime.checker
        assert checker.compared == 5
        assert checker.worst is not None
        assert checker.worst < 1e-5
        report = str(bank.runtime)
    assert f"5 steps against the eager model, largest error {checker.worst:.1e}" in report


PADDED = (torch.arange(12) >= torch.tensor([[3], [0]])).long()


def padded(compiled: Any) -> None:
    """Two rows, of which one is padded; the logits of all tokens are wanted."""
    ids = torch.stack((IDS[0], IDS[0] + 20))
    mask = torch.cat((PADDED, torch.ones(2, 1, dtype=torch.int64)), 1)
    cache = compiled.adaskip.new_cache()
    with torch.no_grad():
        compiled(ids, attention_mask=PADDED, past_key_values=cache)
        compiled(ids[:, :1], attention_mask=mask, past_key_values=cache)
        indices = torch.tensor([1, 11])
        compiled(ids, attention_mask=PADDED, logits_to_keep=indices)


def test_logits_of_padding_mean_nothing(bank: Entry) -> None:
    with bank.using(bank.plan()) as compiled:
        padded(compiled)
        checker = bank.runtime.checker
        assert checker.compared == 3
        assert checker.worst is not None
        assert checker.worst < 1e-5


@pytest.mark.breaks
def test_logits_of_padding_are_others(bank: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr("adaskip_fx.runtime.checking.of_real_tokens", lambda values, _: values)
    with bank.using(bank.plan()) as compiled, pytest.raises(CheckError):
        padded(compiled)


def test_the_last_token_of_a_prompt_in_full(bank: Entry) -> None:
    plan = bank.plan(["0.ffn"])
    full = replace(plan, decode=SkipPlan.empty(plan.sublayers).decode, last_token_full=True)
    with bank.using(full) as compiled:
        request(compiled, IDS, TOKEN)
    assert bank.runtime.checker.compared == 2


def test_a_schedule(bank: Entry) -> None:
    plans = bank.plan(), bank.plan(decode_extra=["1.ffn"])
    before = bank.runtime.plan
    bank.runtime.plan = decisions.Schedule(((0, plans[0]), (2, plans[1])))
    try:
        request(bank.compiled, IDS, TOKEN, TOKEN, TOKEN)
    finally:
        bank.runtime.plan = before
    assert bank.runtime.checker.compared == 4


def test_rows_with_padding_and_tokens_taken_back(bank: Entry) -> None:
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with bank.using() as compiled:
        request(compiled, IDS, attention_mask=mask, position_ids=positions)
        cache = request(compiled, IDS, TOKEN, TOKEN)
        cache.crop(-2)
        with torch.no_grad():
            compiled(TOKEN, past_key_values=cache)
    assert bank.runtime.checker.compared == 5


@pytest.mark.breaks
def test_a_wrong_step_is_found(bank: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: a program that leaves the last sublayer out though the plan does not."""
    run = Program.run

    def wrong(self: Program, *arguments: Any) -> tuple[Any, ...]:
        outputs = run(self, *arguments)
        decoding = self.captured.key.phase == "decode"
        return (outputs[0] * (1.1 if decoding else 1.0), *outputs[1:])

    monkeypatch.setattr(Program, "run", wrong)
    with bank.using() as compiled:
        cache = request(compiled, IDS)
        words = r"the logits of 1 token\(s\) after 12 \(decode, plan \w+\) differ .* by 1.0e-01"
        with pytest.raises(CheckError, match=words), torch.no_grad():
            compiled(TOKEN, past_key_values=cache)


def test_nothing_is_compared_unless_asked(bank: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", ""):
        monkeypatch.setenv("ADASKIP_CHECK", value)
        with bank.using() as compiled:
            request(compiled, IDS, TOKEN)
    assert bank.runtime.checker.compared == 0
    assert "against the eager model" not in str(bank.runtime)


def test_a_request_that_was_not_seen_from_its_beginning(
    bank: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADASKIP_CHECK", "0")
    with bank.using() as compiled:
        cache = request(compiled, IDS)
        monkeypatch.setenv("ADASKIP_CHECK", "1")
        with torch.no_grad():
            compiled(TOKEN, past_key_values=cache)
    assert bank.runtime.checker.compared == 0


def test_a_compiled_model_that_was_changed_is_compared_with_itself(bank: Entry) -> None:
    def doubled(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return 2 * out

    with bank.using() as compiled:
        handle = compiled.model.layers[0].mlp.register_forward_hook(doubled)
        try:
            request(compiled, IDS, TOKEN)
        finally:
            handle.remove()
    assert bank.runtime.checker.compared == 2
    assert bank.compiled.config._attn_implementation == "adaskip"
