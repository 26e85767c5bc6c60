"""Random sequences of public calls on a compiled model and on the eager one, side by side.

After each call: the same values, or both refuse, or the compiled model refuses with a message that
`docs/refusals.md` lists and that is due by what was done before (`tests.machine.world`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers.utils import ModelOutput

from adaskip_fx import SkipPlan
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.runtime import request_step
from tests.machine import refusals
from tests.machine.edits import Change, Edit, Values
from tests.machine.faults import SEQUENCES, Sequence
from tests.machine.structures import STRUCTURES, Side, Structure
from tests.machine.world import (
    SURROUNDINGS,
    DifferenceError,
    Expected,
    Options,
    Request,
    World,
    tokens,
)

T = TypeVar("T")
#: Whether there is time for captures of all states, batch sizes and surroundings.
SOAK = settings().max_examples > 100
#: Structures of `make test`: edits of every kind, both kinds of cache, a plan for decoding, states.
OFTEN = ("llama", "mamba")
SEEDS = st.integers(0, 5)
#: Tokens of a prompt: some are longer than any window, and than what positions round to.
LENGTHS = st.sampled_from((2, 3, 5, 8, 9, 40))


def _side(machine: Machine) -> st.SearchStrategy[Side]:
    return st.sampled_from(machine.world.pair.sides)


#: Which of the requests, or edits, that there are then. What is drawn depends on the structure
#: alone: a call may be refused or not by what earlier sequences have captured, so what there is to
#: choose from may not be the same when hypothesis runs a sequence again.
WHICH = st.integers(0, 59)


def _one_of(found: list[T], which: int) -> T | None:
    return found[which % len(found)] if found else None


def _rows(structure: Structure) -> tuple[int, ...]:
    return (1, 1, 2, 3) if SOAK else structure.rows


def _around(structure: Structure) -> tuple[str, ...]:
    """Surroundings to draw from: none, half of the time."""
    others = tuple(SURROUNDINGS)[1:] if SOAK else structure.surroundings
    return (*(("none",) * len(others)), *others)


#: Arguments of calls that leave nothing behind.
_ALONE: tuple[dict[str, Any], ...] = (
    {"use_cache": False},
    {"return_dict": False},
    {"use_cache": False, "return_dict": False},
    {"output_hidden_states": True},
    {"output_attentions": True},
)
OPTIONS = st.builds(
    Options,
    new=st.integers(1, 4),
    sample=st.booleans(),
    seed=SEEDS,
    as_dictionary=st.sampled_from((True, True, False)),
    use_cache=st.sampled_from((True, True, True, False)),
    stop_token=st.sampled_from((None, None, 7)),
    stop_length=st.sampled_from((None, None, 2)),
    chunk=st.sampled_from((None, None, None, 3)),
)
WHOLE = OPTIONS.map(lambda options: replace(options, chunk=None))


def _offered(machine: Machine, side: Side | None) -> list[Edit]:
    """What this machine does to a compiled model, or to the original (None)."""
    found = machine.world.offered(side)
    if SOAK:
        return found
    if side is None:
        return [e for e in found if not e.casts]
    known = machine.world.structure.captured
    free = ("tensor", "value")
    return [e for e in found if e.kind in free or e.compiled == "refused" or e.name in known]


#: In `make test` mostly one edit at a time, so that graphs of the same few states are used again.
_MOST_EDITS = 3 if SOAK else 1


class Machine(RuleBasedStateMachine):
    """Requests and edits of one structure, in any order."""

    structure = "llama"

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.structure)

    @property
    def turns(self) -> bool:
        """Whether requests get further prompts."""
        return SOAK or self.world.structure.turns

    def teardown(self) -> None:
        self.world.end()

    # New requests ----------------------------------------------------------------------------

    @rule(data=st.data(), count=LENGTHS, seed=SEEDS)
    def prompt(self, data: st.DataObject, count: int, seed: int) -> None:
        structure = self.world.structure
        side = data.draw(_side(self), "on")
        keep = data.draw(st.sampled_from(structure.keeps), "logits_to_keep")
        rows = data.draw(st.sampled_from(_rows(structure)), "rows")
        around = data.draw(st.sampled_from(_around(structure)), "in")
        cache = data.draw(st.sampled_from(("none", "none", "own", "foreign")), "cache")
        self.world.begin(side, count, seed, rows=rows, keep=keep, surroundings=around, cache=cache)

    @rule(data=st.data(), count=LENGTHS, seed=SEEDS)
    def embedded(self, data: st.DataObject, count: int, seed: int) -> None:
        self.world.begin(data.draw(_side(self), "on"), count, seed, embedded=True)

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), count=LENGTHS, more=st.integers(2, 5), seed=SEEDS)
    def adopt(self, data: st.DataObject, count: int, more: int, seed: int) -> None:
        self.world.adopt(data.draw(_side(self), "on"), count, more, seed)

    @rule(data=st.data(), count=LENGTHS, seed=SEEDS)
    def alone(self, data: st.DataObject, count: int, seed: int) -> None:
        side = data.draw(_side(self), "on")
        arguments = data.draw(st.sampled_from(_ALONE), "with")
        self.world.alone(side, count, seed, arguments=arguments)

    @rule(
        data=st.data(),
        count=LENGTHS,
        seed=SEEDS,
        ignored=st.integers(0, 4),
        items=st.sampled_from((None, 3)),
    )
    def labelled(
        self, data: st.DataObject, count: int, seed: int, ignored: int, items: int | None
    ) -> None:
        self.world.labelled(data.draw(_side(self), "on"), count, seed, ignored, items)

    @rule(data=st.data(), first=st.integers(2, 5), second=st.integers(2, 5), seed=SEEDS)
    def packed(self, data: st.DataObject, first: int, second: int, seed: int) -> None:
        if "position_ids" in self.world.pair.forward_arguments:
            self.world.packed(data.draw(_side(self), "on"), first, second, seed)

    @rule(data=st.data(), length=LENGTHS, seed=SEEDS)
    def generate(self, data: st.DataObject, length: int, seed: int) -> None:
        structure = self.world.structure
        side = data.draw(_side(self), "on")
        rows = data.draw(st.sampled_from(_rows(structure)), "rows")
        lengths = (length,) * rows
        if structure.padded and data.draw(st.booleans(), "padded"):
            lengths = (length, length + 3, length + 1)[: max(rows, 2)]
        around = data.draw(st.sampled_from(_around(structure)), "in")
        if around == "autocast":  # what is nearly equal may be another token
            around = "none"
        options = data.draw(OPTIONS if self.turns else WHOLE, "options")
        self.world.generate(side, lengths, seed, options, around)

    @rule(data=st.data(), length=LENGTHS, seed=SEEDS, options=WHOLE)
    def beams(self, data: st.DataObject, length: int, seed: int, options: Options) -> None:
        side = data.draw(_side(self), "on")
        self.world.generate(side, (length,), seed, replace(options, beams=2))

    @rule(data=st.data(), length=st.sampled_from((2, 3, 5)), seed=SEEDS, options=WHOLE)
    def drafts(self, data: st.DataObject, length: int, seed: int, options: Options) -> None:
        side = data.draw(_side(self), "on")
        self.world.drafts(side, length, seed, replace(options, lookup=3))

    # On requests -----------------------------------------------------------------------------

    def _request(self, which: int) -> Iterator[Request]:
        """One of the live requests; a new one where there is none, if it is not refused."""
        world = self.world
        if not world.requests:
            side = _one_of(world.pair.sides, which)
            assert side is not None
            world.begin(side, 5, which % 6, keep=world.structure.keeps[0])
        request = _one_of(world.requests, which)
        if request is not None:
            note(f"on {request}")
            yield request

    @precondition(lambda self: self.turns)
    @rule(which=WHICH, count=st.integers(2, 6), seed=SEEDS)
    def further(self, which: int, count: int, seed: int) -> None:
        for request in self._request(which):
            self.world.further(request, count, seed)

    @precondition(lambda self: not self.world.structure.skips_in_decode)
    @rule(which=WHICH, count=st.integers(1, 3), seed=SEEDS)
    def decode(self, which: int, count: int, seed: int) -> None:
        for request in self._request(which):
            if SOAK or request.stored:  # a prompt of one token is a graph of its own
                for i in range(count):
                    self.world.decode(request, seed + i)

    @precondition(lambda self: self.turns)
    @rule(which=WHICH, count=st.integers(1, 4), seed=SEEDS, options=OPTIONS)
    def turn(self, which: int, count: int, seed: int, options: Options) -> None:
        for request in self._request(which):
            self.world.turn(request, count, seed, replace(options, use_cache=True))

    @rule(which=WHICH, count=st.sampled_from((0, -1, -2, -100, 3)))
    def crop(self, which: int, count: int) -> None:
        for request in self._request(which):
            self.world.crop(request, count)

    @precondition(lambda self: SOAK)
    @rule(which=WHICH, chosen=st.sampled_from(((0,), (0, 0), (1, 0), (1, 1, 0))))
    def rows(self, which: int, chosen: tuple[int, ...]) -> None:
        for request in self._request(which):
            self.world.rows(request, chosen)

    @rule(which=WHICH, around=st.sampled_from(("none", "inference mode")))
    def deepcopy(self, which: int, around: str) -> None:
        for request in self._request(which):
            if self.world.room:
                self.world.copied(request, around)

    @rule(which=WHICH)
    def shallow_copy(self, which: int) -> None:
        for request in self._request(which):
            self.world.shallow(request)

    @precondition(lambda self: len(self.world.pair.sides) > 1)
    @rule(which=WHICH)
    def elsewhere(self, which: int) -> None:
        for request in self._request(which):
            for side in self.world.pair.sides:
                if side is not request.side:
                    self.world.elsewhere(request, side)

    @rule(which=WHICH)
    def forget(self, which: int) -> None:
        for request in self._request(which):
            self.world.forget(request)

    # Edits -----------------------------------------------------------------------------------

    @rule(data=st.data(), which=WHICH)
    def edit(self, data: st.DataObject, which: int) -> None:
        side = data.draw(_side(self), "on")
        if len(self.world.in_force(side)) < _MOST_EDITS:
            self._edit(side, _one_of(_offered(self, side), which))

    @rule(which=WHICH)
    def edit_original(self, which: int) -> None:
        if len(self.world.in_force(None)) < _MOST_EDITS:
            self._edit(None, _one_of(_offered(self, None), which))

    @rule(data=st.data(), which=WHICH)
    def edit_both(self, data: st.DataObject, which: int) -> None:
        side = data.draw(_side(self), "on")
        there = {e.name for e in self.world.in_force(None) if e.kind == "python"}
        found = [e for e in _offered(self, side) if e.name in there]
        self._edit(side, _one_of(found, which))

    def _edit(self, side: Side | None, edit: Edit | None) -> None:
        if edit is not None:
            note(f"{edit}")
            self.world.edit(side, edit)

    @rule(tree=WHICH, which=WHICH)
    def take_back(self, tree: int, which: int) -> None:
        trees = [s for s in (*self.world.pair.sides, None) if self.world.in_force(s)]
        if trees:
            side = trees[tree % len(trees)]
            edit = self.world.in_force(side)[which % len(self.world.in_force(side))]
            note(f"{edit}")
            self.world.take_back(side, edit)


def _marked(value: T, structure: str) -> Any:
    return value if structure in OFTEN else pytest.param(value, marks=pytest.mark.slow)


structures = pytest.mark.parametrize("name", [_marked(name, name) for name in STRUCTURES])


@structures
def test_any_sequence_of_calls_gives_what_the_eager_model_gives(name: str) -> None:
    run_state_machine_as_test(_machine(name), settings=_settings())


def _machine(name: str) -> type[Machine]:
    """The machine of a structure: in `make test` each draws the same every time, and its own."""
    made = type(Machine.__name__, (Machine,), {"structure": name})
    return made if SOAK else seed([*STRUCTURES].index(name))(made)


def _settings() -> settings:
    """As the profile says, but a sequence is as long as many examples elsewhere.

    Of several faults one is shrunk: each attempt may cost captures.
    """
    examples = settings().max_examples
    return settings(
        max_examples=examples if SOAK else examples // 8,
        stateful_step_count=12,
        report_multiple_bugs=False,
        phases=[p for p in Phase if p is not Phase.explain],
    )


@pytest.mark.parametrize("sequence", [_marked(s, s.structure) for s in SEQUENCES], ids=str)
def test_sequences_that_once_went_wrong(sequence: Sequence) -> None:
    if sequence.captures and not SOAK:
        pytest.skip("captures for this alone: HYPOTHESIS_PROFILE=soak")
    world = World(sequence.structure)
    try:
        sequence.run(world, world.pair.sides[-1])
    finally:
        world.end()
    assert world.answered


# The machine can fail ---------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    made = World("llama")
    yield made
    made.end()


@contextmanager
def _without_an_ffn(side: Side) -> Iterator[None]:
    """A compiled model that leaves out a sublayer, which its reference does not."""
    runtime = runtime_of(side.compiled)
    before, runtime.plan = runtime.plan, SkipPlan.of(runtime.sublayers, ["1.ffn"])
    try:
        yield
    finally:
        runtime.plan = before


@pytest.mark.breaks
def test_a_machine_on_a_wrong_compiled_model_fails() -> None:
    class Wrong(Machine):
        def __init__(self) -> None:
            super().__init__()
            self.wrong = _without_an_ffn(self.world.pair.sides[0])
            self.wrong.__enter__()

        def teardown(self) -> None:
            self.wrong.__exit__(None, None, None)
            super().teardown()

    with pytest.raises(DifferenceError, match="another value"):
        run_state_machine_as_test(Wrong, settings=_settings())


def test_another_value_is_a_difference(world: World) -> None:
    side = world.pair.sides[0]
    with _without_an_ffn(side), pytest.raises(DifferenceError, match="logits: relative error"):
        world.begin(side, 5)
    with _without_an_ffn(side), pytest.raises(DifferenceError, match="loss: relative error"):
        world.labelled(side, 5, 0, 1, None)
    with _without_an_ffn(side), pytest.raises(DifferenceError, match="logits: relative error"):
        world.begin(side, 5, embedded=True)
    with _without_an_ffn(side), pytest.raises(DifferenceError, match="another value: sequences"):
        world.generate(side, (5,), 0, Options())
    with _without_an_ffn(side), pytest.raises(DifferenceError, match="another value: tokens"):
        world.generate(side, (5,), 0, Options(new=4, as_dictionary=False))


@pytest.mark.breaks
def test_drafts_that_are_verified_as_a_prompt_are_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_step, "as_decode", lambda plan: plan)
    world = World("qwen3, decode plan")
    try:
        with pytest.raises(DifferenceError, match="another value: "):
            world.drafts(world.pair.sides[0], 4, 0, Options(new=24, lookup=3))
    finally:
        world.end()


@pytest.mark.breaks
def test_beams_that_are_not_reordered_are_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SkipCache, "reorder_cache", lambda self, rows: None)
    with pytest.raises(DifferenceError, match="another value: "):
        world.generate(world.pair.sides[0], (5,), 0, Options(new=12, beams=2))


def test_a_refusal_that_is_not_listed_is_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, asked = world.pair.sides[0], {"output_attentions": True}
    world.alone(side, 5, 0, arguments=asked)
    assert (world.answered, world.refused) == (0, 1)
    monkeypatch.setattr(refusals, "listed", lambda: {"Calls": (), "State": (), "Caches": ()})
    with pytest.raises(DifferenceError, match="is not supported by adaskip_fx yet"):
        world.alone(side, 5, 0, arguments=asked)


def test_a_refusal_of_what_is_not_unusual_is_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a compiled model is for inference only")

    side = world.pair.sides[0]
    monkeypatch.setattr(runtime_of(side.compiled), "step", refuse)
    with pytest.raises(DifferenceError, match="for inference only; nothing was changed"):
        world.begin(side, 5)


def test_an_answer_where_a_refusal_is_due_is_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = Expected("must", ("State",), "changed since")
    monkeypatch.setattr(world, "_expected", lambda *args: due)
    with pytest.raises(DifferenceError, match="gave a value, but must be refused: changed since"):
        world.begin(world.pair.sides[0], 5)


@pytest.mark.breaks
def test_a_cache_of_another_length_is_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.begin(world.pair.sides[0], 5)
    request = world.requests[0]
    monkeypatch.setattr(request.ours, "crop", lambda count: None)
    with pytest.raises(DifferenceError, match="the cache has 5 tokens instead of 3"):
        world.crop(request, -2)


@pytest.mark.breaks
def test_a_hook_that_does_not_run_is_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = itertools.count()
    edit = Edit("a hook", (), lambda model: None, recorded=lambda: next(ran) // 2)
    monkeypatch.setitem(world.pair.edits, edit.name, edit)
    with pytest.raises(DifferenceError, match="hooks ran"):
        world.begin(world.pair.sides[0], 5)


# The edits --------------------------------------------------------------------------------------


@structures
def test_edits_change_the_eager_model_and_are_taken_back_exactly(name: str) -> None:
    structure = STRUCTURES[name]
    model = structure.model()
    ids = tokens(1, 40, 0)

    @torch.no_grad()
    def output() -> dict[str, Any]:
        found = model(input_ids=ids)
        return dict(found) if isinstance(found, ModelOutput) else {"logits": found[0]}

    def says(now: dict[str, Any]) -> bool:
        """Whether this is another output than at first."""
        same = torch.equal(now["logits"], before["logits"])
        return not same or list(now) != list(before)

    before = output()
    for edit in structure.edits(model):
        change, values = Change(model), Values.of(model)
        with torch.no_grad():
            edit.apply(model)
        change.done()
        values.done()
        own = edit.original == "ignored" or edit.compiled == "refused" or edit.recorded
        if not own and edit.name != "merge_adapter()":
            assert says(output()), edit.name
        change.undo()
        with torch.no_grad():
            values.put_back()
        assert not says(output()), edit.name


def test_edits_may_be_taken_back_in_another_order(world: World) -> None:
    original = world.pair.original
    bfloat16, grad = (world.pair.edits[n] for n in ("to(bfloat16)", "requires_grad_(True)"))
    world.edit(None, bfloat16)
    world.edit(None, grad)
    world.take_back(None, bfloat16)
    assert {p.dtype for p in original.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in original.parameters())
    world.take_back(None, grad)
    assert {(p.dtype, p.requires_grad) for p in original.parameters()} == {(torch.float32, False)}


def test_values_that_are_left_behind_are_seen(world: World) -> None:
    (side,) = world.pair.sides
    written = world.pair.edits["parameter written in place"]
    for tree in (side, None):
        world.edit(tree, written)
        assert not world.pair.values.hold()
        world.take_back(tree, written)
        assert world.pair.values.hold()
