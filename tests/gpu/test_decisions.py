"""Schedules and decoupled phases as recorded decode steps; the loss of a plan on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.phase_split import decode_only, prefill_only
from tests.support.compiled_llamas import make_model
from tests.support.decisions import check
from tests.support.on_gpu import OnGpu, on_gpu

STEPS = (6, *[1] * 6, 4, *[1] * 5)


def plans(bank: OnGpu) -> list[Any]:
    skipping = bank.plan(["0.attention", "1.ffn"])
    return [bank.plan(), decode_only(bank.plan(["1.ffn"])), decode_only(skipping)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.filterwarnings("ignore:\\nOnline softmax is disabled")  # Inductor's, in float32
def test_a_schedule_records_one_graph_for_each_plan(backend: str) -> None:
    bank = on_gpu(backend=backend)
    full, less, least = plans(bank)
    schedule = Schedule(((0, full), (2, less), (4, least)))
    for batch in (1, 2):
        before = bank.recorded if batch > 1 else 0
        check(bank, schedule, schedule.at, STEPS, batch=batch)
        assert bank.recorded == before + 3
    with pytest.raises(AssertionError, match="relative error"):
        check(bank, schedule, lambda step: full, STEPS)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.filterwarnings("ignore:\\nOnline softmax is disabled")
def test_the_last_token_of_a_prompt_in_full(backend: str) -> None:
    bank = on_gpu(backend=backend)
    plan = prefill_only(bank.plan(["0.attention", "1.ffn"]))
    check(bank, plan, lambda step: plan, STEPS)
    check(bank, plan, lambda step: plan, (1, 1, 2, 1))


def test_generate_ahead_of_a_schedule() -> None:
    bank = on_gpu()
    full, _, least = plans(bank)
    schedule = Schedule(tuple((step, (full, least)[step % 2]) for step in range(20)))
    bank.runtime.plan = schedule
    ids = bank.tokens(1, 6)
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ahead = bank.compiled.generate(ids, **options)
    bank.runtime.ahead = False
    assert torch.equal(ahead, bank.compiled.generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_is_the_cpus(dtype: torch.dtype) -> None:
    bank = on_gpu("biased", dtype)
    texts, plan = [bank.tokens(1, 40, 3)], bank.plan(["1.ffn"])
    answers = [(bank.tokens(1, 9, 4), bank.tokens(1, 4, 5))]
    loss = CalibrationLoss(bank.compiled, texts, answers)
    pairs = [(a.cpu(), b.cpu()) for a, b in answers]
    on_cpu = make_model("biased", dtype).float()
    other = CalibrationLoss(on_cpu, [t.cpu() for t in texts], pairs, backend="eager")
    assert loss(plan) == pytest.approx(other(plan), rel=1e-3 if dtype is torch.float32 else 0.1)
