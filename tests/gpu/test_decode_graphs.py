"""Recorded decode steps against the eager oracle: replay, growth, plans, requests in turn."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from adaskip_fx.kv_cache import growing_memory
from benchmarks.speed import steps
from tests.support.compiled_llamas import Entry, check_request
from tests.support.eager_reference import assert_close
from tests.support.on_gpu import on_gpu


def plans_of(bank: Entry) -> list[Any]:
    return [
        bank.plan(),
        bank.plan(["0.attention"], factors={"0.attention": 1.5}),
        bank.plan(["1.ffn"], ["0.ffn"], {"0.ffn": 0.75}),
    ]


@pytest.mark.parametrize("shape", ["grouped", "odd", "own_head_dim", "equal_heads"])
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_steps(shape: str, batch: int) -> None:
    bank = on_gpu(shape)
    plans = plans_of(bank) if len(bank.sublayers) > 2 else [bank.plan()]
    for plan in plans:
        with bank.using(plan):
            check_request(bank, plan, (5, *(1,) * 6, 3, 1, 1), batch=batch, keep=1)
    assert bank.recorded == len(plans)


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:\\nOnline softmax is disabled")  # Inductor's, in float32
@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)]
)
def test_fused_projections(dtype: torch.dtype, batch: int) -> None:
    bank = on_gpu("biased", dtype, backend="inductor")
    for plan in plans_of(bank):
        with bank.using(plan):
            check_request(bank, plan, (5, *(1,) * 6), batch=batch, keep=1)


def test_growth_and_other_lengths_record_nothing_again() -> None:
    bank = on_gpu()
    with bank.using():
        cache = check_request(bank, bank.plan(), (250, *(1,) * 12), keep=1)
        assert cache.capacity > cache.length
        del cache
        gc.collect()
        for length in (9, 400, 31):
            check_request(bank, bank.plan(), (length, 1, 1), keep=1)
    assert bank.recorded == 1


def test_buffers_that_are_moved_to_grow_are_recorded_on_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a device cannot map memory."""
    monkeypatch.setattr(growing_memory, "is_available", lambda device: False)
    bank = on_gpu()
    with bank.using():
        cache = check_request(bank, bank.plan(), (250, *(1,) * 12), keep=1)
    assert cache.capacity == 512
    assert bank.recorded == 2


def test_a_plan_changes_in_the_middle_of_a_request() -> None:
    bank = on_gpu()
    before, after = bank.plan(), bank.plan([], ["1.ffn"], {"1.ffn": 0.5})
    with bank.using(before), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for step in range(8):
            ids = bank.tokens(1, 5 if step == 0 else 1, step)
            if step == 4:
                cache.request.decode.plan = after
                bank.oracle.behave({}, {"1.ffn": "skip"}, {"1.ffn": 0.5})
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            expected = bank.oracle.step(ids, reference)[:, -1:]
            assert_close(logits, expected, bank.tolerance, f"step {step}")
    assert bank.recorded == 2


def test_storage_and_recordings_serve_the_next_request() -> None:
    bank = on_gpu()
    with bank.using():
        for _ in range(3):
            check_request(bank, bank.plan(), (5, 1, 1, 1), keep=1)
            gc.collect()
    assert bank.recorded == 1


def test_live_requests_have_storage_of_their_own() -> None:
    bank = on_gpu()
    with bank.using(), torch.no_grad():
        live = [(bank.runtime.new_cache(), bank.reference_cache()) for _ in range(2)]
        for step in range(5):
            for number, (cache, reference) in enumerate(live):
                ids = bank.tokens(1, 6 if step == 0 else 1, 10 * step + number)
                logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
                expected = bank.oracle.step(ids, reference)[:, -1:]
                assert_close(logits, expected, bank.tolerance, f"{number}, {step}")
    assert bank.recorded == 2


def test_returned_logits_stay() -> None:
    bank = on_gpu()
    with bank.using(), torch.no_grad():
        cache = bank.runtime.new_cache()
        bank.compiled(bank.tokens(1, 5), past_key_values=cache)
        for _ in range(2):
            bank.compiled(bank.tokens(1, 1), past_key_values=cache)
        first = bank.compiled(bank.tokens(1, 1), past_key_values=cache).logits
        kept = first.clone()
        bank.compiled(bank.tokens(1, 1, 7), past_key_values=cache)
    assert torch.equal(first, kept)


def test_a_replaced_parameter_is_recorded_anew() -> None:
    bank = on_gpu()
    with bank.using():
        check_request(bank, bank.plan(), (5, 1, 1), keep=1)
        for model in (bank.compiled, bank.oracle.model):
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 3.0)
        check_request(bank, bank.plan(), (5, 1, 1), keep=1)
    assert bank.recorded == 2


def test_dropped_programs_take_their_recordings_along() -> None:
    bank = on_gpu()
    for plan in plans_of(bank):
        with bank.using(plan):
            check_request(bank, plan, (5, 1, 1), keep=1)
    gc.collect()
    before = bank.compiled.adaskip.stats()
    assert before.recordings == 3
    bank.compiled.adaskip.memory_budget = before.graph_bytes + before.program_bytes // 2
    gc.collect()
    after = bank.compiled.adaskip.stats()
    held = [program for b in bank.runtime.buffer_pool.idle for program in b.steps[1]._recordings]
    assert after.programs < before.programs
    assert len(held) == after.recordings <= after.programs


def test_positions_given_by_the_caller_are_used() -> None:
    bank = on_gpu()
    with bank.using(), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for step, count in enumerate((6, 1, 1, 1)):
            ids = bank.tokens(1, count, step)
            start = reference.get_seq_length()
            given = torch.arange(start, start + count, device="cuda").unsqueeze(0) + 3
            logits = bank.compiled(
                ids, past_key_values=cache, position_ids=given, logits_to_keep=1
            ).logits
            expected = bank.oracle.step(ids, reference, position_ids=given)[:, -1:]
            assert_close(logits, expected, bank.tolerance, f"step {step}")


def test_a_recording_of_another_program_is_noticed() -> None:
    """The companion: replaying the wrong graph fails."""
    bank = on_gpu()
    plan = bank.plan([], ["1.ffn"])
    with bank.using(plan):
        bank.oracle.behave({})
        with pytest.raises(AssertionError, match="logits of step 1"):
            check_request(bank, plan, (5, 1, 1), keep=1)


def test_the_benchmark_of_steps_finds_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = on_gpu()
    monkeypatch.setattr("benchmarks.models.tokens", bank.tokens)
    plan = bank.compiled.adaskip.plan
    found = steps(bank.compiled, plan, 1, 16)
    assert found["decode_replay"]["median"] > 0
