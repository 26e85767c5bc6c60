"""Steps of ``generate`` go to the runtime by themselves where forward has nothing to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from adaskip_fx.model import direct, forward
from adaskip_fx.model.compiled_model import CompiledModel
from adaskip_fx.model.forward_inputs import following
from adaskip_fx.utils.torch_internals import nothing_stands_before
from tests.support.compiled_llamas import Entry, entry
from tests.support.generation import Collected, mixed_plan, padded

NEW = 6
PREPARE = "prepare_inputs_for_generation"
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def bank() -> Iterator[Entry]:
    found = entry("grouped")
    with found.using(mixed_plan(found)):
        yield found


@contextmanager
def forwards() -> Iterator[list[int]]:
    """How many new tokens each forward of a compiled model gets meanwhile."""
    seen, run = list[int](), forward._run

    def counted(model: Any, arguments: dict[str, Any]) -> Any:
        seen.append(arguments["input_ids"].shape[1])
        return run(model, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "_run", counted)
        yield seen


def generated(bank: Entry, ids: torch.Tensor, **options: Any) -> list[int]:
    """How many tokens each forward got; the tokens are those of the eager model."""
    options = {"attention_mask": torch.ones_like(ids), **options}
    expected = bank.oracle.model.generate(ids, **GREEDY, **options)
    with forwards() as seen:
        assert torch.equal(bank.compiled.generate(ids, **GREEDY, **options), expected)
    return seen


def test_only_the_prompt_is_a_forward(bank: Entry) -> None:
    ids = bank.tokens(2, 5)
    assert generated(bank, ids) == [5]


def test_the_runtime_gets_tokens_as_they_are_captured(
    bank: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous ones, which a column of a text is not."""
    ids, seen, step = bank.tokens(2, 5), list[torch.Tensor](), bank.runtime.step

    def watched(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tokens)
        return step(tokens, *rest)

    monkeypatch.setattr(bank.runtime, "step", watched)
    assert not ids[:, -1:].is_contiguous()
    assert generated(bank, ids.to(torch.int32)) == [5]
    assert len(seen) == NEW
    assert all(t.is_contiguous() and t.dtype == torch.int64 for t in seen)


def test_padded_rows_need_it(bank: Entry) -> None:
    ids, mask, _ = padded(bank)
    assert generated(bank, ids, attention_mask=mask) == [ids.shape[1]] + [1] * (NEW - 1)


def test_so_do_other_positions(bank: Entry) -> None:
    """Where they do not count on from the cache each step is handed its own."""
    ids = bank.tokens(1, 5)
    seen = generated(bank, ids, position_ids=torch.arange(3, 8).unsqueeze(0))
    assert seen == [5] + [1] * (NEW - 1)


def hook(module: nn.Module, args: Any, result: Any = None) -> None:
    calls.append(type(module).__name__)


calls: list[str] = []
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "after": lambda model: model.register_forward_hook(hook),
    "before": lambda model: model.register_forward_pre_hook(hook),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_called_at_every_step(bank: Entry, name: str) -> None:
    ids = bank.tokens(1, 5)
    expected = bank.oracle.model.generate(ids, **GREEDY)
    calls.clear()
    handle = HOOKS[name](bank.compiled)
    try:
        assert torch.equal(bank.compiled.generate(ids, **GREEDY), expected)
    finally:
        handle.remove()
    assert calls.count(type(bank.compiled).__name__) == NEW


def test_one_that_comes_later_is_called_from_then_on(bank: Entry) -> None:
    class Streamer(Collected):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.tokens) == 5 + 3:  # the prompt and three tokens
                self.handle = bank.compiled.register_forward_hook(hook)

    ids, streamer = bank.tokens(1, 5), Streamer()
    expected = bank.oracle.model.generate(ids, **GREEDY)
    calls.clear()
    try:
        assert torch.equal(bank.compiled.generate(ids, streamer=streamer, **GREEDY), expected)
    finally:
        streamer.handle.remove()
    assert len(calls) == NEW - 3


def test_a_method_in_the_place_of_transformers_is_called(bank: Entry) -> None:
    prepare, steps = bank.compiled.prepare_inputs_for_generation, list[int]()

    def own(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        steps.append(input_ids.shape[1])
        return prepare(input_ids, **kwargs)

    bank.compiled.prepare_inputs_for_generation = own
    try:
        generated(bank, bank.tokens(1, 5))
    finally:
        del bank.compiled.prepare_inputs_for_generation
    assert steps == list(range(5, 5 + NEW))


@pytest.mark.parametrize("method", [PREPARE, "_update_model_kwargs_for_generation"])
def test_a_class_with_a_method_of_its_own_is_not_usual(method: str) -> None:
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    own_model = type("Own", (LlamaForCausalLM,), {method: own})
    prepare = {PREPARE: following(getattr(own_model, PREPARE))}
    assert not direct.is_usual(type("Compiled", (CompiledModel, own_model), prepare))
    prepare = {PREPARE: following(LlamaForCausalLM.prepare_inputs_for_generation)}
    assert direct.is_usual(type("Compiled", (CompiledModel, LlamaForCausalLM), prepare))


def test_a_model_in_training_mode_is_refused_in_mid_request(bank: Entry) -> None:
    class Streamer(Collected):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            bank.compiled.train(len(self.tokens) > 5 + 2)

    try:
        with pytest.raises(RuntimeError, match="inference only; call eval"):
            bank.compiled.generate(bank.tokens(1, 5), streamer=Streamer(), **GREEDY)
    finally:
        bank.compiled.eval()


def test_a_model_that_is_compiled_on_top_is_called(bank: Entry) -> None:
    bank.compiled.compile(backend="eager")
    try:
        assert generated(bank, bank.tokens(1, 5)) == [5] + [1] * (NEW - 1)
    finally:
        bank.compiled._compiled_call_impl = None


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_a_hook_of_all_modules_stands_before_each(register: Callable[..., Any]) -> None:
    module = nn.Linear(2, 2)
    assert nothing_stands_before(module)
    handle = register(hook)
    try:
        assert not nothing_stands_before(module)
    finally:
        handle.remove()
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert not nothing_stands_before(module)
