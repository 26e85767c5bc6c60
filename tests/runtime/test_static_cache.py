"""Decode steps on whole buffers with the position on the device, as on a GPU, but not recorded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Action
from adaskip_fx.runtime.window import Window
from adaskip_fx.testing import plans
from adaskip_passes import UnsupportedError
from tests.support.compiled_llamas import (
    SEEDS,
    STEPS,
    Entry,
    Oracle,
    check_request,
    fewer,
    fixed,
    follow,
    make_model,
)
from tests.support.eager_reference import assert_close, moments
from tests.support.families.all import tiny_config, tiny_model


@fewer(2)
@given(st.data(), st.sampled_from(["grouped", "three_layers"]), STEPS, SEEDS)
def test_any_plan_equals_the_oracle(
    data: st.DataObject, shape: str, steps: tuple[int, ...], seed: int
) -> None:
    bank = fixed(shape)
    plan = data.draw(plans(bank.sublayers))
    with bank.using(plan):
        check_request(bank, plan, steps, seed=seed, keep=1)


@pytest.mark.parametrize(
    "shape",
    [
        "llama3_rope",
        *(
            pytest.param(shape, marks=pytest.mark.slow)
            for shape in ("biased", "own_head_dim", "one_kv_head", "odd")
        ),
    ],
)
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_shapes_and_batches(shape: str, batch: int) -> None:
    bank = fixed(shape)
    with bank.using():
        check_request(bank, bank.plan(), (5, 1, 1, 4, 1, 1), batch=batch, keep=1)


class Tape:
    """A recorder as on a GPU: what it records is not run until it is replayed."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def run(self, body: Callable[[], object]) -> None:
        self.did.append("run")
        body()

    def record(self, body: Callable[[], object]) -> Any:
        self.did.append("record")
        return SimpleNamespace(replay=body, nbytes=1000)

    def replay(self, recording: Any) -> None:
        recording.replay()


def test_a_plan_of_pieces_that_have_run_is_recorded_at_once() -> None:
    model = make_model("three_layers")
    compiled = build(model, None, backend="eager", static_cache=True)
    tape = runtime_of(compiled).runner.static._recorder = Tape()
    bank = Entry(model, compiled, Oracle(model))
    changes = {  # at which step, to what, and what that does first
        1: (bank.plan(), ["run", "record"]),
        3: (bank.plan([], ["1.ffn"], {"1.ffn": 0.5}), ["run", "record"]),  # scales: a new piece
        5: (bank.plan([], ["0.ffn"], {"0.ffn": 0.75}), ["record"]),
        7: (bank.plan([], ["2.ffn"]), ["record"]),
    }
    with bank.using(bank.plan()), torch.no_grad():
        cache, reference = bank.runtime.new_cache(capacity=64), bank.reference_cache()
        for step in range(9):
            if step in changes:
                plan, expected_first = changes[step]
                cache.request.decode_with(plan)
                follow(bank.oracle, plan)
            ids = bank.tokens(1, 5 if step == 0 else 1, step)
            tape.did.clear()
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            assert tape.did == (expected_first if step in changes else [])
            expected = bank.oracle.step(ids, reference)[:, -1:]
            assert_close(logits, expected, bank.tolerance, f"step {step}")


def test_with_other_weights_pieces_run_before_they_are_recorded() -> None:
    model = make_model("three_layers")
    compiled = build(model, None, backend="eager", static_cache=True)
    tape = runtime_of(compiled).runner.static._recorder = Tape()
    bank = Entry(model, compiled, Oracle(model))
    other = bank.plan([], ["2.ffn"])
    for plan, first in ((bank.plan(), "run"), (other, "record")):
        with bank.using(plan):
            tape.did.clear()
            check_request(bank, plan, (5, 1, 1), keep=1)
            assert tape.did[0] == first
            gc.collect()  # the storage goes back
    compiled.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 3.0)
    bank.oracle.model.lm_head.weight = compiled.lm_head.weight
    with bank.using(other):
        tape.did.clear()
        check_request(bank, other, (5, 1, 1), keep=1)
        assert tape.did == ["run", "record"]


def test_a_plan_that_the_oracle_does_not_follow_is_caught() -> None:
    """The companion."""
    bank = fixed("grouped")
    plan = bank.plan([], ["1.ffn"])
    with bank.using(plan):
        bank.oracle.behave({})
        with pytest.raises(AssertionError, match="logits of step 1"):
            check_request(bank, plan, (5, 1, 1), keep=1)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_storage_grows_in_the_middle(batch: int) -> None:
    bank = fixed("grouped")
    with bank.using():
        cache = check_request(bank, bank.plan(), (252, *(1,) * 8), batch=batch, keep=1)
    assert cache.capacity == 512


def test_the_buffers_of_a_request_serve_the_next_one() -> None:
    bank = fixed("grouped")

    def buffers() -> set[int]:
        cache = check_request(bank, bank.plan(), (6, 1), keep=1)
        return {t.data_ptr() for t in (*cache.keys, *cache.values) if t is not None}

    with bank.using():
        first = buffers()
        gc.collect()
        assert bank.runtime.buffer_pool.idle_bytes > 0
        assert buffers() == first
        gc.collect()
        assert " buffer" in str(bank.runtime)
        bank.runtime.free()
        assert bank.runtime.buffer_pool.idle_bytes == 0
        assert " buffer" not in str(bank.runtime)
        plan = bank.plan(["0.attention"])
        with bank.using(plan):  # stores fewer layers, so those do not fit
            check_request(bank, plan, (6, 1), keep=1)


def test_nothing_of_a_request_is_left_for_the_next_one() -> None:
    """A request that went wrong would spoil the next where anything reads what it did not write."""
    bank = fixed("grouped")
    with bank.using():
        cache: Any = check_request(bank, bank.plan(), (6, 1), keep=1)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(float("nan"))
        pointers = [t.data_ptr() for t in cache.keys]
        del cache, tensor
        gc.collect()
        again: Any = check_request(bank, bank.plan(), (6, 1, 3, 1), keep=1)
    assert [t.data_ptr() for t in again.keys] == pointers


def test_live_requests_share_no_buffer() -> None:
    bank = fixed("grouped")
    with bank.using():
        one = check_request(bank, bank.plan(), (6, 1), keep=1)
        two = check_request(bank, bank.plan(), (6, 1), keep=1)
    pointers = [{t.data_ptr() for t in c.keys if t is not None} for c in (one, two)]
    assert not pointers[0] & pointers[1]


def test_elsewhere_nothing_is_kept() -> None:
    """Keeping buffers is for recordings; without them it would only hold memory."""
    model = make_model("one_layer")
    bank = Entry(model, build(model, None, backend="eager"), Oracle(model))
    with bank.using():
        check_request(bank, bank.plan(), (6, 1), keep=1)
    gc.collect()
    assert bank.runtime.buffer_pool.idle_bytes == 0


def test_positions_given_by_the_caller_then_counted_on() -> None:
    bank = fixed("grouped")
    with bank.using(), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for step, shift in enumerate((0, 0, 5, 0, 0)):
            ids = bank.tokens(1, 6 if step == 0 else 1, step)
            start = reference.get_seq_length()
            given_ids = torch.arange(start, start + ids.shape[1]).unsqueeze(0) + shift
            logits = bank.compiled(
                ids,
                past_key_values=cache,
                position_ids=given_ids if shift else None,
                logits_to_keep=1,
            ).logits
            expected = bank.oracle.step(ids, reference, position_ids=given_ids)[:, -1:]
            assert_close(logits, expected, 1e-5, f"step {step}")


def test_crop_puts_the_position_back() -> None:
    bank = fixed("grouped")
    with bank.using(), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for ids in (bank.tokens(1, 6), bank.tokens(1, 1, 1)):
            bank.compiled(ids, past_key_values=cache)
            bank.oracle.step(ids, reference)
        bank.compiled(bank.tokens(1, 1, 2), past_key_values=cache)
        cache.crop(-1)
        ids = bank.tokens(1, 1, 3)
        logits = bank.compiled(ids, past_key_values=cache).logits
        assert_close(logits, bank.oracle.step(ids, reference), 1e-5)


def test_padded_batches_take_the_masked_graph() -> None:
    bank = fixed("grouped")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with bank.using(), torch.no_grad():
        cache, reference = bank.runtime.new_cache(), bank.reference_cache()
        for step in range(4):
            ids = bank.tokens(2, 6 if step == 0 else 1, step)
            if step:
                mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            given_ = {"attention_mask": mask, "position_ids": positions}
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=1, **given_).logits
            expected = bank.oracle.step(ids, reference, mask, positions)[:, -1:]
            assert_close(logits, expected, 1e-5, f"step {step}")
        assert cache.padded


def test_generate_leaves_out_a_mask_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it would wait for the device at every step; a mask with padding is handed on."""
    bank = fixed("grouped")
    seen: list[bool] = []
    step = bank.runtime.step

    def watching(ids: Any, mask: Any, *rest: Any) -> Any:
        seen.append(mask is not None)
        return step(ids, mask, *rest)

    monkeypatch.setattr(bank.runtime, "step", watching)
    ids = bank.tokens(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with bank.using():
        bank.compiled.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert seen == [False] * 4
        seen.clear()
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
        bank.compiled.generate(input_ids=ids, attention_mask=mask, **options)
        assert seen == [True] * 4


def test_probes_measure_what_the_oracle_sees() -> None:
    bank = fixed("three_layers")
    plan = bank.plan(["1.ffn"], factors={"1.ffn": 1.25})
    with bank.using(plan), bank.probing(plan) as readings:
        check_request(bank, plan, (6, 1, 1), keep=1)
    streams = bank.oracle.streams
    runs = [s for s in plan.sublayers if plan.action("decode", s) is Action.RUN]
    for sublayer, reading in zip(runs, readings[-1], strict=True):
        expected = moments(*streams[str(sublayer)])
        torch.testing.assert_close(reading.double(), expected, rtol=1e-5, atol=1e-5)


def test_ended_rows_count_for_nothing_in_the_window() -> None:
    bank = fixed("grouped")
    with bank.using(), torch.no_grad():
        cache = bank.runtime.new_cache(stop_tokens=torch.tensor([7, 9]))
        bank.compiled(bank.tokens(2, 5), past_key_values=cache)
        probed = tuple(s for s in bank.sublayers if s.kind == "ffn")
        cache.request.decoding = True
        cache.request.decode.window = Window(probed, size=100)
        counts = []
        for token in ([1, 2], [9, 3], [4, 5], [6, 7]):
            bank.compiled(torch.tensor(token).unsqueeze(1), past_key_values=cache)
            assert cache.request.window.statistics is not None
            counts.append(cache.request.window.statistics[0, :, -1].tolist())
    assert counts == [[1, 1], [1, 2], [1, 3], [1, 3]]


def test_a_model_that_cannot_be_captured_so_decodes_on_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adaskip_fx.programs import program_cache

    capture_phase = program_cache.phase_graph.capture_phase

    def refusing(model: Any, forward: Any, key: Any, *rest: Any) -> Any:
        if key.static_cache:
            raise UnsupportedError("it looks at its mask")
        return capture_phase(model, forward, key, *rest)

    monkeypatch.setattr(program_cache.phase_graph, "capture_phase", refusing)
    model = make_model("one_layer")
    made = build(model, None, backend="eager", static_cache=True)
    bank = Entry(model, made, Oracle(model))
    assert "CUDA graph" not in str(bank.runtime)
    with bank.using():
        check_request(bank, bank.plan(), (5, 1, 1), keep=1)
    assert "not as one CUDA graph, because it looks at its mask" in str(bank.runtime)
    assert not bank.runtime.static_cache


def test_a_sliding_window_is_seen_on_whole_buffers() -> None:
    """Masked attention over buffers of which a part was never written."""
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        sliding_window=6,
        max_position_embeddings=128,
        initializer_range=0.25,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    compiled = build(model, None, backend="eager", static_cache=True)
    cache, reference = compiled.adaskip.new_cache(), DynamicCache()
    with torch.no_grad():
        for step in range(10):
            ids = torch.randint(0, 61, (1, 5 if step == 0 else 1))
            logits = compiled(ids, past_key_values=cache, logits_to_keep=1).logits
            expected = model(ids, past_key_values=reference).logits[:, -1:]
            assert_close(logits, expected, 1e-5, f"step {step}")


@pytest.mark.slow
def test_kept_buffers_are_not_used_for_another_dtype() -> None:
    """The next request after a model has moved needs buffers of its own."""
    model = tiny_model(tiny_config("llama"))
    compiled = build(model, None, backend="eager", static_cache=True)
    ids = torch.arange(3, 12).unsqueeze(0)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "attention_mask": torch.ones_like(ids)}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        got, expected = (m.generate(ids, **options) for m in (compiled, model))
        for mine, theirs in zip(got.logits, expected.logits, strict=True):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        del got
