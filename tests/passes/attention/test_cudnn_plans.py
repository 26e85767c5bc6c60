"""A shape has a plan once other kernels have cost as much; and which kernel runs then."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_passes.attention import cuda_kernels
from adaskip_passes.attention.cudnn_plans import _PLAN, _SHAPES, CudnnPlans


def run(calls: list[tuple[str, float]], pay: Callable[[str, float], bool]) -> dict[str, float]:
    """What each shape's calls cost in all, in plans: other kernels by seconds."""
    cost: dict[str, float] = {}
    planned = set()
    for shape, seconds in calls:
        if pay(shape, seconds):
            cost[shape] = cost.get(shape, 0.0) + (0 if shape in planned else 1)
            planned.add(shape)
        else:
            cost[shape] = cost.get(shape, 0.0) + seconds / _PLAN
    return cost


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 3).map(lambda x: x * _PLAN))),
)
def test_nothing_costs_twice_what_it_must(calls: list[tuple[str, float]]) -> None:
    for shape, cost in run(calls, CudnnPlans().pay).items():
        total = sum(seconds for s, seconds in calls if s == shape)
        assert cost <= 2 * min(total / _PLAN, 1) + 1e-9


@pytest.mark.breaks
@pytest.mark.parametrize("always", [True, False])
def test_a_plan_for_all_or_for_none_may(always: bool) -> None:
    """The companion."""
    calls = [("a", 0.1 * _PLAN)] if always else [("a", _PLAN)] * 5
    cost = run(calls, lambda *_: always)["a"]
    total = sum(seconds for _, seconds in calls)
    assert cost > 2 * min(total / _PLAN, 1)


def test_a_plan_stays() -> None:
    plans = CudnnPlans()
    assert [plans.pay("a", 0.4 * _PLAN) for _ in range(4)] == [False, False, True, True]
    assert not plans.pay("b", 0.4 * _PLAN)
    assert not plans.pay("c", _PLAN, plans=2)
    assert plans.pay("c", _PLAN, plans=2)


def test_another_thread_has_none() -> None:
    plans, got = CudnnPlans(), list[bool]()
    assert plans.pay("a", _PLAN)
    thread = threading.Thread(target=lambda: got.append(plans.pay("a", 0.1 * _PLAN)))
    thread.start()
    thread.join()
    assert got == [False]


def test_shapes_that_do_not_come_again_are_forgotten() -> None:
    plans = CudnnPlans()
    plans.pay("a", _PLAN)
    for shape in range(_SHAPES):
        plans.pay(shape, 1e-9)
    assert len(plans._seconds) == _SHAPES
    assert not plans.pay("a", 0.1 * _PLAN)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_have_a_plan_at_once() -> None:
    assert CudnnPlans().pay("a", 1e-9)


# Which kernel ----------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which kernels ran; both are there until a test says otherwise."""
    names = list[str]()
    for name in ("flash_attention", "causal", "_in_two_parts"):

        def kernel(query: torch.Tensor, *_: object, name: str = name) -> torch.Tensor:
            names.append(name)
            return query

        monkeypatch.setattr(cuda_kernels, name, kernel)
    for name in ("can_use_flash_attention", "can_use_cudnn_attention"):
        monkeypatch.setattr(cuda_kernels, name, lambda _: True)
    monkeypatch.setattr(cuda_kernels, "_plans", CudnnPlans())
    return names


def attend(tokens: int, stored: int) -> None:
    query, key = torch.empty(1, 8, tokens, 64), torch.empty(1, 2, stored, 64)
    cuda_kernels._attend_causal(query, key, key, 1.0)


def test_a_prompt_begins_with_flash_attention(
    ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 4 * 8 * 64 * 300 * 150 * cuda_kernels._LONGER_ON_FLASH
    monkeypatch.setattr("adaskip_passes.attention.cudnn_plans._PLAN", 2.5 * seconds)
    for tokens in (300, 300, 300, 301, 300):
        attend(tokens, tokens)
    assert ran == ["flash_attention"] * 2 + ["causal", "flash_attention", "causal"]


def test_a_chunk_needs_two_plans(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 4 * 8 * 64 * 200 * (300 + 100) * cuda_kernels._LONGER_ON_FLASH
    monkeypatch.setattr("adaskip_passes.attention.cudnn_plans._PLAN", 0.9 * seconds)
    for _ in range(3):
        attend(200, 500)
    assert ran == ["flash_attention", "_in_two_parts", "_in_two_parts"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tokens", [128, 129])
def test_tiles_stand_in_for_flash_attention(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, tokens: int, known: bool
) -> None:
    """Of more than a few queries, where they are known to be faster."""

    def attend_causal(query: torch.Tensor, *_: object) -> torch.Tensor:
        ran.append("tiles")
        return query

    name = "adaskip_passes.attention.triton_kernels.tiles"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(attend_causal=attend_causal))
    monkeypatch.setattr(cuda_kernels, "knows_tiles", lambda *_: known)
    attend(tokens, 500)
    assert ran == ["tiles" if known and tokens == 129 else "flash_attention"]


def test_tiles_are_of_hopper_alone() -> None:
    query = torch.empty(1, 8, 300, 128, dtype=torch.bfloat16)
    assert not cuda_kernels.knows_tiles(query, query)


def test_few_queries_never_have_one(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_passes.attention.cudnn_plans._PLAN", 0.0)
    attend(128, 500)
    attend(129, 500)
    assert ran == ["flash_attention", "_in_two_parts"]


@pytest.mark.parametrize(
    ("cudnn", "tokens", "kernel"),
    [(True, 300, "_in_two_parts"), (False, 300, "causal"), (False, 500, "causal")],
)
def test_without_flash_attention(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, cudnn: bool, tokens: int, kernel: str
) -> None:
    monkeypatch.setattr(cuda_kernels, "can_use_flash_attention", lambda _: False)
    monkeypatch.setattr(cuda_kernels, "can_use_cudnn_attention", lambda _: cudnn)
    attend(tokens, 500)
    assert ran == [kernel]
