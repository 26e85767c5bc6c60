"""Steps that were looked at while the device was busy: what changes afterwards is still seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import pytest
import torch

from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model import direct
from adaskip_fx.runtime import ready_step, turns
from adaskip_fx.runtime.ready_step import ReadyStep
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.speculation.proposals import Context, Drafts
from tests.support.drafts import Drafting, Oracle, drafting

NEW = 24


@pytest.fixture
def bank() -> Iterator[Drafting]:
    found = drafting(static=True)
    found.runtime.free()
    yield found
    found.fast.eval()


@contextmanager
def ready_runs() -> Iterator[list[int]]:
    """How many tokens each ready step ran meanwhile; 0 where it had no room."""
    seen, run = list[int](), ReadyStep.run

    def counted(step: ReadyStep, tokens: torch.Tensor) -> torch.Tensor | None:
        logits = run(step, tokens)
        seen.append(0 if logits is None else tokens.shape[1])
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadyStep, "run", counted)
        yield seen


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options
    )
    return tokens


class At:
    """A streamer that does something once, when so many tokens were streamed."""

    def __init__(self, count: int, do: Callable[[], object]) -> None:
        self.left, self._do = count, do

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            self._do()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("wrong", [0, 3])
@pytest.mark.parametrize("longest", [3, 7, 9])
def test_blocks_after_the_first_are_ready(bank: Drafting, wrong: int, longest: int) -> None:
    ids = bank.tokens(1, 14)
    want = generated(bank.model, ids)
    for turn in range(2):
        stats = bank.begin(Oracle(want, wrong), longest=longest).stats
        with ready_runs() as seen:
            assert torch.equal(generated(bank.fast, ids), want)
        assert seen
        assert 0 not in seen
        if turn:  # steps of all sizes have run
            assert len(seen) >= stats.verifications - stats.steps - 1


def test_several_rows(bank: Drafting) -> None:
    ids = bank.tokens(3, 11)
    want = generated(bank.model, ids)
    bank.begin(Oracle(want, 4), longest=3)
    with ready_runs() as seen:
        assert torch.equal(generated(bank.fast, ids), want)
    assert max(seen) == 4
    assert 0 not in seen


@dataclass
class Pausing(Oracle):
    """Has something every second time, so that a plain step is before a block."""

    asked: int = 0

    def propose(self, context: Context, most: int) -> Drafts | None:
        self.asked += 1
        return super().propose(context, most) if self.asked % 2 else None


@pytest.mark.parametrize("proposer", [Oracle, Pausing])
def test_a_hook_that_comes_meanwhile_is_called(bank: Drafting, proposer: type[Oracle]) -> None:
    ids, calls = bank.tokens(1, 14), list[int]()
    want, handles = generated(bank.model, ids), list[Any]()

    def hooks() -> None:
        handle = bank.fast.register_forward_hook(lambda *given: calls.append(1))
        handles.append(handle)

    try:
        bank.begin(proposer(want), longest=3)
        tokens = generated(bank.fast, ids, streamer=At(2 + 9, hooks))
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(tokens, want)
    assert len(calls) >= 2


@pytest.mark.breaks
def test_a_hook_would_be_missed(bank: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what was ready once stays so."""
    kept = dict[int, ReadyStep]()

    def stays(runtime: Runtime, cache: SkipCache) -> dict[int, ReadyStep]:
        if not kept:
            kept.update(ready_step.ready_steps(runtime, cache))
        return dict(kept)

    monkeypatch.setattr(direct, "_leads_to_runtime", lambda model: True)
    monkeypatch.setattr(direct, "ready_steps", stays)
    with pytest.raises(AssertionError, match="assert 0 >= 2"):
        test_a_hook_that_comes_meanwhile_is_called(bank, Oracle)


def test_training_mode_is_refused(bank: Drafting) -> None:
    ids = bank.tokens(1, 14)
    bank.begin(Oracle(generated(bank.model, ids)), longest=3)
    with pytest.raises(RuntimeError, match=r"for inference only; call eval\(\) on it"):
        generated(bank.fast, ids, streamer=At(2 + 9, bank.fast.train))


def test_an_observer_is_told_of_every_step(bank: Drafting) -> None:
    ids, told = bank.tokens(1, 14), list[int]()
    want = generated(bank.model, ids)
    bank.begin(Oracle(want), longest=3)
    bank.runtime.observer = lambda program, plan, tokens: told.append(tokens)
    try:
        with ready_runs() as seen:
            assert torch.equal(generated(bank.fast, ids), want)
    finally:
        bank.runtime.observer = None
    assert not seen
    assert sum(told[1:]) >= NEW - 1


def test_checks_see_every_step(bank: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = bank.tokens(1, 14)
    want = generated(bank.model, ids)
    bank.begin(Oracle(want), longest=3)
    monkeypatch.setenv("ADASKIP_CHECK", "1")
    with ready_runs() as seen:
        assert torch.equal(generated(bank.fast, ids), want)
    assert not seen


def test_no_room_is_no_step(bank: Drafting) -> None:
    """It is left to the step that looks at everything, which makes room."""
    ids = bank.tokens(1, 14)
    want = generated(bank.model, ids)
    bank.begin(Oracle(want), longest=3)
    with ready_runs() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            direct,
            "ready_steps",
            lambda *given: {
                size: ReadyStep(s.cache, s.cache.length, s._step, s._binding, s._weights)
                for size, s in ready_step.ready_steps(*given).items()
            },
        )
        assert torch.equal(generated(bank.fast, ids), want)
    assert seen
    assert not any(seen)


def test_a_text_that_grows_longer_than_trained_is_told_of(
    bank: Drafting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that is ready is for as many tokens as nothing has to be said of."""
    ids = bank.tokens(1, 14)
    want = generated(bank.model, ids)
    bank.begin(Oracle(want), longest=3)
    generated(bank.fast, ids)
    monkeypatch.setattr(bank.runtime.graphs, "trained_length", 25)
    monkeypatch.setattr(turns, "_said", WeakSet())
    with ready_runs() as seen, caplog.at_level("WARNING", "adaskip_fx"):
        assert torch.equal(generated(bank.fast, ids), want)
    assert 0 in seen
    assert set(seen) - {0}
    assert len([m for m in caplog.messages if m.startswith("a sequence of ")]) == 1
