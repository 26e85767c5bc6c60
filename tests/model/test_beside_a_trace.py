"""A step runs in one thread while another one traces, as compilers do: FX exchanges `__call__`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from tests.support.compiled_llamas import entry

SHAPE = "one_layer"


def beside_a_trace(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Do something in a thread while this one traces a function."""
    found: list[Any] = []

    def tried() -> None:
        try:
            with torch.no_grad():
                found.append(work())
        except Exception as error:
            found.append(error)

    def traced(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=tried)
        thread.start()
        thread.join()
        return x + 1

    fx.symbolic_trace(traced)
    (result,) = found
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, torch.Tensor)
    return result


def test_a_step_of_a_compiled_model() -> None:
    bank, ids = entry(SHAPE), entry(SHAPE).tokens(1, 5)

    def step() -> torch.Tensor:
        cache = bank.runtime.new_cache()
        bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
        logits: torch.Tensor = bank.compiled(ids[:, :1], past_key_values=cache).logits
        return logits

    with torch.no_grad():
        alone = step()
    assert torch.equal(beside_a_trace(step), alone)


@pytest.mark.breaks
def test_a_step_of_a_model_as_it_is() -> None:
    """The companion: what a compiled model's step did before, and any other module's does."""
    bank, ids = entry(SHAPE), entry(SHAPE).tokens(1, 5)
    with pytest.raises(NameError, match="module is not installed as a submodule"):
        beside_a_trace(lambda: bank.model(ids).logits)
