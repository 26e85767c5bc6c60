"""Drafts on a GPU, where blocks are recorded graphs and the host accepts what it has read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.runtime.ready_step import ReadyStep
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.proposals import Proposer
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from tests.support.drafts import Oracle
from tests.support.on_gpu import OnGpu, on_gpu

NEW = 40


@pytest.fixture(scope="module")
def bank() -> OnGpu:
    return on_gpu()


def generated(bank: OnGpu, ids: torch.Tensor, *proposers: Proposer, longest: int = 7) -> Any:
    runtime, plan = bank.runtime, SkipPlan.empty(bank.runtime.sublayers)
    decoding = Lossless(proposers, longest, adaptive=False) if proposers else None
    runtime.speculation = None if decoding is None else Speculation(decoding, plan)
    try:
        return bank.compiled.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
    finally:
        runtime.speculation = None


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("wrong", [0, 1, 3])
@pytest.mark.parametrize("longest", [1, 3, 7, 9, 15])
def test_the_same_tokens(bank: OnGpu, rows: int, wrong: int, longest: int) -> None:
    with bank.using():
        ids = bank.tokens(rows, 9)
        want = generated(bank, ids)
        for _ in range(2):  # recorded, and run again
            found = generated(bank, ids, Oracle(want, wrong), longest=longest)
            assert torch.equal(found, want)


@pytest.mark.parametrize("rows", [1, 3])
def test_who_drafts(bank: OnGpu, rows: int) -> None:
    with bank.using():
        ids = bank.tokens(rows, 4).repeat(1, 5)
        want = generated(bank, ids)
        plan = SkipPlan.of(bank.runtime.sublayers, ["1.ffn"])
        for proposers in ((Lookup(),), (Skipped(plan),), (Lookup(), Skipped(plan))):
            assert torch.equal(generated(bank, ids, *proposers), want)


@pytest.mark.breaks
def test_a_block_in_the_wrong_place_shows(bank: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: a step that is ready believes all drafts of the last block to stand."""
    run, lengths = ReadyStep.run, list[int]()

    def late(step: ReadyStep, tokens: torch.Tensor) -> torch.Tensor | None:
        lengths.append(step.cache.length)
        step.cache.length += 1
        logits = run(step, tokens)
        step.cache.length -= 1
        return logits

    monkeypatch.setattr(ReadyStep, "run", late)
    with bank.using():
        ids = bank.tokens(1, 9)
        want = generated(bank, ids)
        assert not torch.equal(generated(bank, ids, Oracle(want, 3)), want)
    assert lengths
