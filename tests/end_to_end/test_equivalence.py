"""The compiled model computes what the eager model with replaced sublayers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.plans.skip_plan import Action, SkipPlan, Sublayer
from adaskip_fx.programs.rewrite import rewrite
from adaskip_fx.runtime.similarity import measure_prompt
from adaskip_fx.testing import plans
from adaskip_passes import Replacement, Skip, fuse, run_passes
from adaskip_passes.infra.graph_module import text
from tests.support.compiled_llamas import (
    CELLS,
    DRAWN,
    OFTEN,
    SEEDS,
    STEPS,
    Cell,
    Entry,
    check_request,
    entry,
    fewer,
    scales,
)
from tests.support.eager_reference import assert_close, moments

COSINE, TOKENS = 0, 4  # columns of moments

# The whole request ------------------------------------------------------------------------------


@settings(parent=fewer(2))
@given(st.data(), st.sampled_from(DRAWN), STEPS, SEEDS)
def test_a_request_equals_the_oracle(
    data: st.DataObject, cell: Cell, steps: tuple[int, ...], seed: int
) -> None:
    """Logits of every step and K/V after it: prompt, chunks and decoded tokens, any plan."""
    bank = cell.entry()
    plan = data.draw(plans(bank.sublayers))
    with bank.using(plan):
        check_request(bank, plan, steps, batch=cell.batch, seed=seed, keep=cell.keep)


def names(bank: Entry, kind: str = "") -> list[str]:
    return [str(s) for s in bank.sublayers if kind in ("", s.kind)]


def special_plans(bank: Entry) -> dict[str, list[str]]:
    """Skip sets at the edges of what is allowed."""
    everything, last = names(bank), len(bank.sublayers) // 2 - 1
    pair = [f"{layer}.attention" for layer in (1, 2)]
    return {
        "layer 0": ["0.attention", "0.ffn"],
        "the first attention": ["0.attention"],
        "the last layer": [f"{last}.attention", f"{last}.ffn"],
        "the last ffn": [f"{last}.ffn"],
        "all attention of a layer pair": pair,
        "all attention": names(bank, "attention"),
        "all ffn": names(bank, "ffn"),
        "neighbours": ["0.ffn", "1.attention", "1.ffn"],
        "all but the first": everything[1:],
        "all but the last": everything[:-1],
        "all but one in the middle": [n for n in everything if n != "1.attention"],
    }


@pytest.mark.parametrize("case", special_plans(entry("three_layers")))
@pytest.mark.parametrize("scaled", [False, True])
def test_special_skip_sets(case: str, scaled: bool) -> None:
    bank = entry("three_layers")
    skip = special_plans(bank)[case]
    plan = bank.plan(skip, factors=dict.fromkeys(skip, 0.75) if scaled else None)
    with bank.using(plan):
        check_request(bank, plan, (9, 1, 1, 4, 1))


@pytest.mark.parametrize("prompt", [1, 2, 3, 255, 256, 257, 300])
def test_prompts_around_the_limits_of_lengths(prompt: int) -> None:
    """One and two tokens are special to compilers, 256 is the block that storage grows by."""
    bank = entry("grouped")
    plan = bank.plan(["0.attention", "1.ffn"], factors={"0.attention": 1.5})
    with bank.using(plan):
        check_request(bank, plan, (prompt, 1, 1, 2, 1))


def test_past_the_models_positions() -> None:
    """A prompt must fit; decoding may go on, as it does in transformers."""
    bank = entry("grouped")
    with bank.using():
        check_request(bank, bank.plan(), (599, 1, 1, 1))


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2), SEEDS)
def test_any_mask(mask: list[list[bool]], seed: int) -> None:
    """Padding anywhere: prompt, chunk and decoded token, at the tokens that are none."""
    bank = entry("grouped")
    valid = torch.tensor([[*row, True, *row[:3], True, True] for row in mask])
    plan = bank.plan(["0.attention"], factors={"0.attention": 1.25})
    with bank.using(plan), torch.no_grad():
        cache, reference, begin = bank.runtime.new_cache(), bank.reference_cache(), 0
        for number, count in enumerate((7, 4, 1)):
            ids, begin = bank.tokens(2, count, seed + number), begin + count
            seen = valid[:, :begin].long()
            logits = bank.compiled(ids, attention_mask=seen, past_key_values=cache).logits
            expected = bank.oracle.step(ids, reference, seen)
            counted = seen[:, -count:].bool()
            assert_close(logits[counted], expected[counted], 1e-5, f"step {number}")


def test_a_mask_that_is_not_used_is_caught() -> None:
    """The companion."""
    bank = entry("grouped")
    ids, mask = bank.tokens(2, 7), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    with bank.using(), torch.no_grad():
        logits = bank.compiled(ids, attention_mask=mask).logits
        expected = bank.oracle.step(ids, bank.reference_cache())
    assert_close(logits[0], expected[0], 1e-5)
    with pytest.raises(AssertionError):
        assert_close(logits[1], expected[1], 1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_positions_of_the_callers(shared: bool) -> None:
    bank = entry("grouped")
    ids = bank.tokens(2, 5)
    positions = torch.tensor([[3, 4, 5, 6, 7], [0, 1, 2, 10, 11]])
    with bank.using(), torch.no_grad():
        given = positions[:1] if shared else positions
        logits = bank.compiled(ids, position_ids=given).logits
        expected = bank.oracle.step(ids, bank.reference_cache(), position_ids=given)
        assert_close(logits, expected, 1e-5)
        if not shared:
            with pytest.raises(AssertionError):
                assert_close(bank.compiled(ids).logits, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_logits_to_keep(keep: int) -> None:
    """More than there are tokens as well."""
    bank = entry("grouped")
    for tokens in (1, 2, 3, 9):
        ids = bank.tokens(1, tokens)
        with torch.no_grad():
            logits = bank.compiled(ids, logits_to_keep=keep).logits
            assert_close(logits, bank.model(ids, logits_to_keep=keep).logits, 1e-5)


def test_other_integer_types_and_layouts() -> None:
    bank = entry("grouped")
    ids = bank.tokens(2, 6)
    with bank.using(), torch.no_grad():
        expected = bank.compiled(ids).logits
        assert torch.equal(bank.compiled(ids.int()).logits, expected)
        assert torch.equal(bank.compiled(ids.t().contiguous().t()).logits, expected)


def test_a_skipped_ffn_in_decode_only() -> None:
    bank = entry("grouped")
    plan = bank.plan(["1.attention"], ["0.ffn"], {"0.ffn": 1.25, "1.attention": 0.5})
    with bank.using(plan):
        check_request(bank, plan, (6, 1, 1, 3, 1))


@pytest.mark.parametrize("phases", [("kv_only", "run"), ("run", "kv_only"), ("kv_only", "kv_only")])
def test_kv_only_stores_keys_and_adds_nothing(phases: tuple[str, str]) -> None:
    bank = entry("grouped")
    first = bank.sublayers[0]
    plan = SkipPlan(bank.sublayers, {first: Action(phases[0])}, {first: Action(phases[1])})
    with bank.using(plan):
        cache = check_request(bank, plan, (6, 1, 3, 1))
    assert all(cache.stored)


def test_kv_only_ignores_a_factor() -> None:
    """`kv_only` adds nothing to the stream, and so no factor either, which no key contains."""
    bank = entry("grouped")
    plan = kv_only_with_factor(bank, "0.attention", 0.5)
    with bank.using(plan):
        check_request(bank, plan, (6, 1, 3, 1))


def kv_only_with_factor(bank: Entry, name: str, factor: float) -> SkipPlan:
    action = {Sublayer.parse(name): Action.KV_ONLY}
    return SkipPlan(bank.sublayers, action, action, scales({name: factor}))


# The companions: what the properties above would not let pass -----------------------------------


def failing(bank: Entry, plan: SkipPlan) -> str:
    """What `check_request` complains about."""
    with pytest.raises(AssertionError) as caught:
        check_request(bank, plan, (6, 1, 1))
    return str(caught.value)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_wrong_factor_is_caught(phase: str) -> None:
    bank = entry("three_layers")
    skip = ["1.attention", "1.ffn"] if phase == "prefill" else ["1.attention"]
    extra = [] if phase == "prefill" else ["1.ffn"]
    plan = bank.plan(skip, extra, {"1.attention": 0.8, "1.ffn": 0.9})
    with bank.using(plan):
        bank.oracle.factors = {**bank.oracle.factors, "1.ffn": 0.9 * 1.001}
        assert f"step {0 if phase == 'prefill' else 1}" in failing(bank, plan)


def test_a_sublayer_that_runs_though_skipped_is_caught() -> None:
    bank = entry("three_layers")
    for name in names(bank):
        with bank.using(bank.plan()):
            bank.oracle.behave({name: "skip"})
            assert "step 0" in failing(bank, bank.plan())


@pytest.mark.breaks
def test_a_dropped_kv_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    step_view = SkipCache.step_view

    def lossy(self: SkipCache, *args: Any) -> Any:
        views = step_view(self, *args)
        views.layers[1].values = views.layers[1].values.clone()  # written to, then forgotten
        return views

    monkeypatch.setattr(SkipCache, "step_view", lossy)
    bank = entry("three_layers")
    with bank.using():
        assert "layer 1 values" in failing(bank, bank.plan())


@pytest.mark.slow
@pytest.mark.breaks
def test_a_lost_position_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = entry("three_layers")
    with bank.using():
        monkeypatch.setattr(torch, "arange", _shifted(torch.arange))
        failing(bank, bank.plan())


def _shifted(arange: Any) -> Any:
    # transformers calls arange with one end, the runtime with two
    def shifted(*args: Any, **kwargs: Any) -> Any:
        return arange(*args, **kwargs) + (1 if len(args) == 2 and args[0] > 0 else 0)

    return shifted


@pytest.mark.breaks
def test_a_stale_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is reused for another plan gives wrong answers."""
    bank = entry("three_layers")
    monkeypatch.setattr(SkipPlan, "phase_digest", lambda self, phase: "the same for all")
    first, second = bank.plan(["0.ffn"]), bank.plan(["1.ffn"])
    with bank.using(first):
        check_request(bank, first, (6, 1))
    with bank.using(second):
        assert "step 0" in failing(bank, second)


@pytest.mark.breaks
def test_storage_for_skipped_attention_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = entry("three_layers")
    plan = bank.plan(["1.attention"])
    graphs = bank.runtime.graphs
    monkeypatch.setattr(graphs, "stored", lambda plan: list(graphs.specs))
    with bank.using(plan):
        assert "layer 1: storage True" in failing(bank, plan)


# The empty plan ---------------------------------------------------------------------------------

PHASES = ("prefill", "extend", "decode")


def captured_step(bank: Entry, phase: str, keep: int) -> Any:
    """A step's captured graph, its arguments, and the program linked for the empty plan."""
    runtime, seen = bank.runtime, {}
    cache = runtime.new_cache()
    program = runtime.graphs.program

    def spy(key: Any, plan: Any, probed: Any, arguments: Any, *rest: Any) -> Any:
        made = program(key, plan, probed, arguments, *rest)
        seen.update(key=key, plan=plan, arguments=dict(arguments), program=made)
        return made

    steps = {"prefill": (7,), "extend": (7, 5), "decode": (7, 1)}[phase]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(runtime.graphs, "program", spy)
        for number, count in enumerate(steps):
            ids = bank.tokens(1, count, number)
            logits = bank.compiled(ids, past_key_values=cache, logits_to_keep=keep).logits
    (captured,) = runtime.graphs.states.current.captures[seen["key"]]
    return captured, seen, logits


def code(graph_module: torch.fx.GraphModule) -> str:
    return graph_module.graph.python_code("self").src


@pytest.mark.parametrize(
    "cell",
    [
        cell if cell in OFTEN else pytest.param(cell, marks=pytest.mark.slow)
        for cell in CELLS
        if cell.batch == 1
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=pytest.mark.slow) if p == "extend" else p for p in PHASES]
)
def test_an_empty_plan_is_the_captured_graph(cell: Cell, phase: str) -> None:
    """Bit-equal to the graph run as it came, and the same graph as text."""
    bank = cell.entry()
    with bank.using():
        captured, seen, logits = captured_step(bank, phase, cell.keep)
    capture = captured.capture
    arguments = seen["arguments"]
    for layer in arguments["cache"].layers:  # the step has stored its tokens: take them out
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    with torch.no_grad():
        as_it_came = capture.graph(*capture.binder(capture.sources)(arguments))
    assert torch.equal(as_it_came[0], logits)
    empty = SkipPlan.empty(bank.sublayers)
    plan_phase = "decode" if phase == "decode" else "prefill"
    outer = rewrite(captured.outer, captured.sublayers, empty, plan_phase)
    assert code(fuse(outer)) == code(capture.graph)


def test_another_plan_is_another_text() -> None:
    """The companion: a plan that skips anything changes the text."""
    bank = entry("grouped")
    captured = captured_prompt(bank)
    for name in names(bank):
        outer = rewrite(captured.outer, captured.sublayers, bank.plan([name]), "prefill")
        assert code(fuse(outer)) != code(captured.capture.graph)


# Composition of skips ---------------------------------------------------------------------------


@given(st.data(), st.sampled_from(["grouped", "three_layers", "four_layers"]))
def test_skipping_a_then_b_is_skipping_both(data: st.DataObject, shape: str) -> None:
    """As plans (the key) and as rewrites of a graph (its text)."""
    bank = entry(shape)
    size = len(bank.sublayers)
    both = data.draw(st.sets(st.sampled_from(bank.sublayers), max_size=size - 1))
    a = data.draw(st.sets(st.sampled_from(sorted(both)))) if both else set()
    b = both - a
    at_once = SkipPlan.of(bank.sublayers, both)
    assert SkipPlan.of(bank.sublayers, [*b, *a, *b]).digest == at_once.digest
    captured = captured_prompt(bank)

    def skip(chosen: set[Any]) -> Skip:
        return Skip({bank.sublayers.index(s): Replacement("nothing") for s in chosen})

    outer = rewrite(captured.outer, captured.sublayers, at_once, "prefill")
    in_turn = run_passes(run_passes(captured.outer, (skip(a),)), (skip(b),))
    assert text(in_turn) == text(outer)


def captured_prompt(bank: Entry) -> Any:
    """The graph that `build` captured to prove the sublayers."""
    return bank.runtime.graphs._kept.first


def test_skipping_other_sublayers_is_another_text() -> None:
    """The companion: the texts compared above differ when the sets do."""
    bank = entry("three_layers")
    captured = captured_prompt(bank)
    texts = {
        text(rewrite(captured.outer, captured.sublayers, bank.plan([name]), "prefill"))
        for name in names(bank)
    }
    assert len(texts) == len(bank.sublayers)


# Probes -----------------------------------------------------------------------------------------


def probed_run(
    bank: Entry, plan: SkipPlan, batch: int, steps: tuple[int, ...], seed: int, keep: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last step without and with probes: logits, logits, and moments [probed, batch, 5]."""

    def run() -> torch.Tensor:
        cache = bank.runtime.new_cache()
        for number, count in enumerate(steps):
            ids = bank.tokens(batch, count, seed + number)
            with torch.no_grad():
                output = bank.compiled(ids, past_key_values=cache, logits_to_keep=keep)
        logits: torch.Tensor = output.logits
        return logits

    without = run()
    with bank.probing(plan) as readings:
        with_probes = run()
    return without, with_probes, readings[-1]


@given(st.data(), st.sampled_from(DRAWN), st.sampled_from([(6,), (6, 4), (6, 1)]), SEEDS)
def test_probes_measure_and_change_nothing(
    data: st.DataObject, cell: Cell, steps: tuple[int, ...], seed: int
) -> None:
    """Outputs bit-equal without and with probes; values as sums in float64 on the same stream."""
    bank = cell.entry()
    plan = data.draw(plans(bank.sublayers))
    with bank.using(plan):
        without, with_probes, readings = probed_run(bank, plan, cell.batch, steps, seed, cell.keep)
        assert torch.equal(without, with_probes)
        reference = bank.reference_cache()
        for number, count in enumerate(steps):
            bank.oracle.step(bank.tokens(cell.batch, count, seed + number), reference)
        check_moments(bank, readings)


def check_moments(bank: Entry, readings: torch.Tensor) -> None:
    """Compare with the oracle's last forward; the stream of bfloat16 may be rounded elsewhere."""
    assert len(readings) == len(bank.oracle.streams)
    for reading, (name, stream) in zip(readings, bank.oracle.streams.items(), strict=True):
        expected, found = moments(*stream), reading.double()
        for column in range(5):
            actual, right = found[:, column], expected[:, column]
            if column == COSINE:  # may add up to nothing: the error is counted against 1 a token
                actual, right = expected[:, TOKENS] + actual - right, expected[:, TOKENS]
            assert_close(actual, right, bank.tolerance, f"moment {column} of {name}")


@pytest.mark.parametrize("column", range(5))
def test_a_wrong_reading_is_caught(column: int) -> None:
    bank = entry("three_layers")
    plan = bank.plan(["1.attention"])
    with bank.using(plan):
        _, _, readings = probed_run(bank, plan, 1, (6,), 0)
        bank.oracle.step(bank.tokens(1, 6, 0), bank.reference_cache())
        check_moments(bank, readings)
        readings[2, 0, column] *= 1.0001
        with pytest.raises(AssertionError, match=f"moment {column} of 1.ffn"):
            check_moments(bank, readings)


def test_padding_counts_for_nothing() -> None:
    """Left-padded prompts: each row's moments are those of the row alone."""
    bank = entry("grouped")
    lengths = (3, 7, 1)
    ids = bank.tokens(3, 7)
    mask = torch.tensor([[0] * (7 - n) + [1] * n for n in lengths])
    with bank.using():
        measured = measure_prompt(bank.runtime, ids, mask)
        assert measured.shape == (len(bank.sublayers), 3, 5)
        assert measured[:, :, 4].tolist() == [[3.0, 7.0, 1.0]] * len(bank.sublayers)
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, -length:]
            # positions are those of the padded row: with rotary embeddings only distance counts
            bank.oracle.step(alone, bank.reference_cache())
            for sublayer, stream in enumerate(bank.oracle.streams.values()):
                expected = moments(*stream)[0]
                assert_close(measured[sublayer, row].double(), expected, 1e-5)
