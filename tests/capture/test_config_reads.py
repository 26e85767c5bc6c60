"""Reads of a config while a model is traced: what they give, and what is noticed of them later."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.symbolic_convert import InliningInstructionTranslator
from transformers import PreTrainedConfig

from adaskip_fx.capture import config_reads
from adaskip_passes import capture
from adaskip_passes.tracing.capture import Capture

X = torch.arange(1.0, 5.0)


class Renamed(PreTrainedConfig):
    """Width by two names; values that are computed; values that a class has."""

    model_type = "renamed"
    attribute_map = {"hidden_size": "width"}  # noqa: RUF012
    gain: float = 0.5

    def __init__(self, **more: Any) -> None:
        self.width = 3.0
        super().__init__(**more)

    @property
    def doubled(self) -> float:
        return self.hidden_size * 2.0

    @property
    def new(self) -> list[float]:
        return [self.width, 7.0]


class Other(Renamed):
    """Code of its own gives something else than is stored."""

    model_type = "other"
    __init__ = Renamed.__init__

    def __getattribute__(self, key: str) -> Any:
        value = super().__getattribute__(key)
        return value + 1.0 if key == "width" else value


class Found(Renamed):
    """What is not there is found elsewhere."""

    model_type = "found"
    __init__ = Renamed.__init__

    def __getattr__(self, key: str) -> Any:
        if key == "absent":
            return 11.0
        raise AttributeError(key)


class Breaks(Renamed):
    """Code that raises, at last."""

    model_type = "breaks"
    __init__ = Renamed.__init__

    def __getattribute__(self, key: str) -> Any:
        if key == "width":
            raise RuntimeError(key)
        return super().__getattribute__(key)


class First(Renamed):
    """A class's property goes before what is stored under its name."""

    model_type = "first"
    __init__ = Renamed.__init__

    @property
    def gain(self) -> float:  # type: ignore[override]
        return 2.5

    @gain.setter
    def gain(self, value: float) -> None:
        vars(self)["gain"] = value


def reading(x: torch.Tensor, config: Any) -> torch.Tensor:
    x = x * config.width + config.hidden_size
    x = x * config.gain + config.doubled + config.new[1]
    absent = getattr(config, "absent", 5.0) + getattr(config, "missing", 0.25)
    return x + absent + config.hidden_size * config.width


def traced(
    config: Any, exchange: Any = config_reads.traced_once, function: Any = reading
) -> Capture:
    made: Capture = capture(function, {"x": X, "config": config}, lambda c: c, None, exchange)
    return made


def outcome(captured: Capture, config: Any) -> torch.Tensor:
    values = captured.binder(captured.sources)({"x": X, "config": config})
    result: torch.Tensor = captured.graph(*values)[0]
    return result


def names(captured: Capture) -> set[str]:
    """All that was read, without what is numbered anew in every trace."""
    return {n for n in captured.reads.names if not n.isdigit() and "__builtins" not in n}


@pytest.mark.parametrize("kind", [Renamed, Other, Found, First])
def test_a_read_gives_what_the_config_gives(kind: type[Renamed]) -> None:
    config = kind()
    torch.testing.assert_close(outcome(traced(config), config), reading(X, config), rtol=0, atol=0)


def test_configs_differ_in_what_they_give() -> None:
    """The companion."""
    plain, *others = (reading(X, kind()) for kind in (Renamed, Other, Found, First))
    assert not any(torch.equal(other, plain) for other in others)


@pytest.mark.parametrize(
    ("kind", "name", "plain"),
    [
        (Renamed, "width", "width"),
        (Renamed, "hidden_size", "width"),
        (Renamed, "gain", "gain"),
        (Renamed, "doubled", "doubled"),
        (Renamed, "missing", "missing"),
        (Renamed, "new", None),  # another object each time
        (Other, "width", None),
        (Other, "hidden_size", "width"),
        (Found, "absent", None),
        (Found, "missing", "missing"),
        (Breaks, "width", None),
    ],
)
def test_only_a_read_that_gives_what_is_stored_is_not_traced(
    kind: type[Renamed], name: str, plain: str | None
) -> None:
    assert config_reads._plain_name(kind(), name) == plain


def test_other_objects_are_traced() -> None:
    assert config_reads._plain_name(torch.nn.Linear(2, 2), "in_features") is None


def test_what_is_read_is_known_as_if_every_read_was_traced() -> None:
    full, some = names(traced(Renamed(), nullcontext)), names(traced(Renamed()))
    assert {"width", "gain", "absent", "missing", "attribute_map"} <= full
    assert full - some <= {"__class__", "hidden_size"}  # a class, and a name of nothing stored


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a config's code was traced since the last time."""
    seen: list[str] = []
    inline = InliningInstructionTranslator.inline_call_

    def counted(translator: Any) -> Any:
        seen.append(translator.f_code.co_name)
        return inline(translator)

    monkeypatch.setattr(InliningInstructionTranslator, "inline_call_", counted)

    def since() -> int:
        found = seen.count("__getattribute__")
        seen.clear()
        return found

    return since


def stored(x: torch.Tensor, config: Any) -> torch.Tensor:
    return x * config.width + config.hidden_size + config.doubled + config.gain


def test_a_configs_code_is_traced_for_its_first_read(count: Callable[[], int]) -> None:
    traced(Renamed(), nullcontext, lambda x, config: x * config.width)
    once = count()
    traced(Renamed(), config_reads.traced_once, stored)
    assert count() == once
    traced(Renamed(), nullcontext, stored)
    assert count() >= 4 * once


def test_settings_by_layer_are_noticed_when_they_come() -> None:
    """transformers keeps them beside the others, and then refuses reads of what they replace."""
    known = names(traced(Renamed(), nullcontext)) & {"_heterogeneity_spec"}  # since 5.22
    assert names(traced(Renamed())) & {"_heterogeneity_spec"} == known


def test_dynamo_reads_as_before_afterwards(count: Callable[[], int]) -> None:
    traced(Renamed())
    count()
    torch.compile(reading, backend="eager", fullgraph=True)(X, Renamed())
    assert count() > 10
