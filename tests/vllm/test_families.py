"""Families and plans in vLLM, against eager transformers, by log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogate import Surrogate
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.serving.overrides import overrides
from tests.vllm import models, reference
from tests.vllm.engines import PROMPT, engine, generated, known_in_process

TOKENS = 8
TOLERANCE = 1e-4  #: of log-probabilities in float32
SUBLAYERS = [Sublayer(i, k) for i in range(models.LAYERS) for k in ("attention", "ffn")]


@dataclass(frozen=True)
class Case:
    """A plan, and what the reference does instead of the branches that it skips."""

    skip: tuple[str, ...]
    surrogates: Mapping[str, Surrogate] = field(default_factory=dict)
    instead: Mapping[str, reference.Replace] = field(default_factory=dict)
    windows: Mapping[int, int] = field(default_factory=dict)

    @property
    def plan(self) -> SkipPlan:
        found = {Sublayer.parse(s): c for s, c in self.surrogates.items()}
        windows = {Sublayer(i, "attention"): Window(n, 0) for i, n in self.windows.items()}
        return SkipPlan.of(
            SUBLAYERS, self.skip, surrogates=Surrogates(found), windows=Windows.of(windows)
        )


def everything() -> Case:
    """Every kind of surrogate at once, and a window: one engine for a family."""
    draw = np.random.default_rng(0)
    hidden, rank = 128, 3
    weight, weight2 = (draw.normal(0, 0.05, (hidden, hidden)) for _ in range(2))
    down, up = draw.normal(0, 0.2, (rank, hidden)), draw.normal(0, 0.2, (hidden, rank))
    bias, factor = draw.normal(0, 0.1, hidden), draw.uniform(0.5, 1.5, hidden)
    surrogates = {
        "0.attention": Surrogate.scale(0.8),  # no stream is a pair yet
        "0.ffn": Surrogate("linear", {"weight": weight, "bias": bias}),
        "1.attention": Surrogate("low_rank", {"down": down, "up": up, "bias": bias}),
        "2.ffn": Surrogate("normalized", {"weight": weight2, "bias": bias}),
        "3.attention": Surrogate("diagonal", {"factor": factor}),
    }
    instead = {
        "0.attention": reference.scale(0.8),
        "0.ffn": reference.affine(weight, bias),
        "1.attention": reference.affine(up @ down, bias),
        "2.ffn": reference.affine(weight2, bias, normed=True),
        "3.attention": lambda x: x * x.new_tensor(factor),
    }
    return Case(tuple(surrogates), surrogates, instead, {2: 7})


SCALED = Case(
    ("0.attention", "1.ffn", "2.attention"),
    {"0.attention": Surrogate.scale(0.8), "1.ffn": Surrogate.scale(1.3)},
    {"0.attention": reference.scale(0.8), "1.ffn": reference.scale(1.3)},
)
PASSED = Case(("0.ffn", "1.attention", "3.ffn"), windows={2: 7})
WINDOWED = Case(("3.ffn",), windows={1: 7, 2: 7})
#: one family for each way in which layers are built
CASES: dict[str, dict[str, Case]] = {
    "llama": {"everything": everything(), "some": SCALED, "windows": WINDOWED, "none": Case(())},
    "gemma2": {"everything": everything(), "windows": WINDOWED},
    "granite": {"everything": everything()},
    "mixtral": {"everything": everything()},
    "cohere": {"passed on": PASSED},
    "olmo2": {"everything": everything()},
}
#: built like Llama
ALIKE = {family: {"everything": everything()} for family in ("qwen2", "qwen3")}


def expected(model: Any, case: Case) -> tuple[list[int], Any]:
    """What greedy search writes behind the prompt, and all log-probabilities."""
    instead = {name: reference.scale(1.0) for name in case.skip} | dict(case.instead)
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        found = reference.log_probabilities(model, tokens, instead, case.windows)
        tokens.append(int(found[-1].argmax()))
    return tokens, found


def difference(wanted: Any, found: list[dict[int, float]]) -> float:
    """The greatest difference of log-probabilities, of each token's five most probable next."""
    pairs = (
        abs(float(wanted[at, token]) - value)
        for at, values in enumerate(found)
        for token, value in values.items()
    )
    return max(pairs)


@pytest.mark.parametrize(
    "family", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)]
)
def test_a_family_follows_its_plans(family: str, folders: models.Folders, tmp_path: Path) -> None:
    model = folders.reference(family)
    cases = {**CASES, **ALIKE}[family]
    wanted = {name: expected(model, case) for name, case in cases.items()}
    plain = expected(model, Case(()))[1]
    known_in_process(folders[family])
    for name, case in cases.items():
        with engine(folders[family], overrides(case.plan, tmp_path)) as llm:
            tokens, found = generated(llm, PROMPT, TOKENS)
        assert PROMPT + tokens == wanted[name][0], name
        assert difference(wanted[name][1], found) < TOLERANCE, name
        if case.skip:  # the companion: the model without the plan is far from it
            assert difference(plain, found) > 1000 * TOLERANCE, name
