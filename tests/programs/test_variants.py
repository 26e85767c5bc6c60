"""A second plan costs no capture and no compilation; programs are kept by plan and forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.testing import plans
from tests.support.compiled_llamas import Entry, check_request, entry, make_model
from tests.support.eager_reference import Oracle, assert_close

STEPS = (5, 1, 3)


def request(bank: Entry, plan: SkipPlan) -> None:
    with bank.using(plan):
        check_request(bank, plan, STEPS)


def counts(bank: Entry) -> dict[str, int]:
    counters = dataclasses.asdict(bank.runtime.counters)
    return {**counters, "pieces": bank.runtime.pieces_compiled}


def first_plans(bank: Entry) -> None:
    """Have each way to replace a sublayer compiled: a scale, and the K/V writes that stay."""
    kv_only = {bank.sublayers[0]: Action.KV_ONLY}
    request(bank, bank.plan(["0.attention"], factors={"0.attention": 0.5}))
    request(bank, SkipPlan(bank.sublayers, kv_only, kv_only))


@given(st.data())
def test_a_second_plan_captures_and_compiles_nothing(data: st.DataObject) -> None:
    bank = entry("grouped")
    first_plans(bank)
    before = counts(bank)
    plan = data.draw(plans(bank.sublayers))
    request(bank, plan)
    once = counts(bank)
    request(bank, SkipPlan(plan.sublayers, plan.prefill, plan.decode, plan.surrogates))
    assert counts(bank) == once, "the same plan made twice is the same key"
    assert (once["captures"], once["pieces"]) == (before["captures"], before["pieces"])
    assert once["links"] - before["links"] <= 3  # prefill, extend, decode


def test_another_shape_is_counted() -> None:
    """The companion: a capture and its pieces do show in the counters."""
    model = make_model("grouped")
    bank = Entry(model, build(model, None, backend="eager"), Oracle(model))
    request(bank, bank.plan())
    before = counts(bank)
    with bank.using():
        check_request(bank, bank.plan(), (4,), batch=5)
        after = counts(bank)
        check_request(bank, bank.plan(), (4,), batch=3)
    assert after["captures"] == before["captures"] + 1
    assert after["pieces"] > before["pieces"]
    assert after["links"] == before["links"] + 1
    assert counts(bank) == after, "other rows are no other shape, if there are two of them"


def distinct(bank: Entry) -> Iterator[SkipPlan]:
    """Plans that differ in one thing each: what is skipped, how, in which phase, the factor."""
    for sublayer in bank.sublayers:
        name = str(sublayer)
        yield bank.plan([name])
        yield bank.plan([name], factors={name: 1.5})
        yield bank.plan([name], factors={name: 1.5000001})
        if sublayer.kind == "ffn":
            yield bank.plan([], [name])
            yield bank.plan([], [name], {name: 1.5})
        else:
            yield SkipPlan(bank.sublayers, {sublayer: Action.KV_ONLY}, {})
            yield SkipPlan(bank.sublayers, {}, {sublayer: Action.KV_ONLY})


def test_every_other_plan_is_another_key() -> None:
    bank = entry("grouped")
    every = [bank.plan(), *distinct(bank)]
    assert len({p.digest for p in every}) == len(every)
    for plan in every:
        again = SkipPlan(plan.sublayers, plan.prefill, plan.decode, plan.surrogates)
        assert again.digest == plan.digest
    keys = {(p.phase_digest("prefill"), p.phase_digest("decode")) for p in every}
    assert len(keys) == len(every)


def test_what_a_phase_does_not_do_is_not_in_its_key() -> None:
    """An extra ffn of decode leaves the prompt's program alone."""
    bank = entry("grouped")
    request(bank, bank.plan(["1.attention"]))
    before = counts(bank)
    request(bank, bank.plan(["1.attention"], ["0.ffn"], {"0.ffn": 0.8125}))  # nobody else's
    assert counts(bank)["links"] == before["links"] + 1


@pytest.fixture(scope="module")
def small() -> Entry:
    """A model with room for the graph of a prompt, and two of its programs."""
    model = make_model("one_layer")
    bank = Entry(model, build(model, None, backend="eager"), Oracle(model))
    prompt(bank, scaled(bank, 0.25))
    stats = bank.compiled.adaskip.stats()
    assert (stats.graphs, stats.programs) == (1, 1)
    bank.compiled.adaskip.memory_budget = stats.graph_bytes + 2 * stats.program_bytes
    return bank


def scaled(bank: Entry, factor: float) -> SkipPlan:
    """One of several plans whose programs are as large."""
    return bank.plan(["0.ffn"], factors={"0.ffn": factor})


def prompt(bank: Entry, plan: SkipPlan) -> int:
    """How many programs were linked for one prompt."""
    before = bank.runtime.counters.links
    ids = bank.tokens(1, 5)
    with bank.using(plan), torch.no_grad():
        logits = bank.compiled(ids, logits_to_keep=1).logits
        assert_close(logits, bank.oracle.step(ids, bank.reference_cache())[:, -1:], 1e-5)
    return bank.runtime.counters.links - before


def test_the_least_recently_used_program_is_dropped(small: Entry) -> None:
    a, b, c = (scaled(small, factor) for factor in (0.5, 2.0, 1.25))
    dropped = small.runtime.counters.dropped
    assert [prompt(small, p) for p in (a, b, a, c, a, b, c)] == [1, 1, 0, 1, 0, 1, 1]
    assert small.runtime.counters.dropped - dropped == 4
    assert small.runtime.counters.captures == 1


def test_requests_survive_the_loss_of_their_programs(small: Entry) -> None:
    """Two requests in turn, each with its own plan and factor, and room for two programs."""
    live: list[tuple[SkipPlan, Any, Any]] = []
    for factor in (0.5, 2.0, 1.25):
        plan = small.plan([], ["0.ffn"], {"0.ffn": factor})
        live.append((plan, None, small.reference_cache()))
    for step, count in enumerate((4, 1, 1, 1, 1)):
        for number, (plan, cache, reference) in enumerate(live):
            with small.using(plan), torch.no_grad():
                cache = cache or small.runtime.new_cache()
                ids = small.tokens(1, count, 10 * step + number)
                logits = small.compiled(ids, past_key_values=cache, logits_to_keep=1).logits
                expected = small.oracle.step(ids, reference)[:, -1:]
            assert_close(logits, expected, 1e-5, f"request {number}, step {step}")
            live[number] = (plan, cache, reference)
    assert small.runtime.counters.dropped > 6


def test_linking_makes_no_text_and_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both take longer than a plan that is learned while decoding can wait."""
    import adaskip_passes.infra.pass_manager as pipeline
    from adaskip_passes import PieceCompiler

    bank = entry("grouped")
    first_plans(bank)

    def refuse(*args: Any) -> Any:
        raise AssertionError("not while linking")

    monkeypatch.setattr(pipeline, "text", refuse)
    monkeypatch.setattr(PieceCompiler, "compile", refuse)
    request(bank, bank.plan(["1.ffn", "0.attention"], factors={"1.ffn": 0.75}))


# Keys that the captured graph depends on --------------------------------------------------------


def test_what_a_graph_depends_on_is_in_its_key() -> None:
    """Batch, mask, more than the last token's logits, autocast: another value, another graph."""
    bank = entry("grouped")
    compiled = build(make_model("grouped"), None, backend="eager")  # nothing captured before
    runtime = runtime_of(compiled)
    ids, masked = bank.tokens(1, 5), torch.tensor([[0, 1, 1, 1, 1]])

    def captures(**inputs: Any) -> int:
        before = runtime.counters.captures
        with torch.no_grad():
            compiled(**inputs)
        return runtime.counters.captures - before

    captures(input_ids=ids, logits_to_keep=1)
    assert captures(input_ids=ids, logits_to_keep=1) == 0
    assert captures(input_ids=ids[:, :4], logits_to_keep=1) == 0  # a length is no key
    assert captures(input_ids=ids, logits_to_keep=2) == 1
    assert captures(input_ids=ids, logits_to_keep=0) == 0  # nor is how many
    assert captures(input_ids=ids, logits_to_keep=1, attention_mask=masked) == 1
    assert captures(input_ids=ids.repeat(4, 1), logits_to_keep=1) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert captures(input_ids=ids, logits_to_keep=1) == 1
    assert captures(input_ids=ids, logits_to_keep=1, attention_mask=torch.ones(1, 5)) == 0


@pytest.mark.slow
def test_four_models_capture_four_times() -> None:
    """Equal configurations, one process: nothing is left of the one before, no limit is hit."""
    from adaskip_fx.programs import program_cache

    calls: list[Any] = []
    original = program_cache.phase_graph.capture_phase
    ids = torch.arange(5, 9).unsqueeze(0)

    def counting(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_cache.phase_graph, "capture_phase", counting)
        for seed in range(4):
            model = make_model("one_layer", seed=seed)
            compiled = build(model, None, backend="eager")
            with torch.no_grad():
                logits = compiled(ids, logits_to_keep=1).logits
                assert_close(logits, model(ids).logits[:, -1:], 1e-5)
    assert len(calls) == 4
