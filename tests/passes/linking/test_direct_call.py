"""What Inductor compiled is called without its wrappers, where these change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from adaskip_fx.utils.torch_internals import find_cpp_compiler
from adaskip_passes.linking.direct_call import without_wrappers


class Graph:
    """Stands in for what Inductor returns: a list goes in, and is emptied."""

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        def call(inputs: list[Any]) -> tuple[Any, ...]:
            given = tuple(inputs)
            inputs.clear()
            return function(*given)

        self.current_callable = call

    def __call__(self, inputs: list[Any]) -> tuple[Any, ...]:
        return self.current_callable(inputs)


class Wrapper:
    """Stands in for AOTAutograd's: counts its calls, and may change inputs and outputs."""

    def __init__(self, graph: Any, before: Any = list, after: Any = list) -> None:
        self.__wrapped__ = graph
        self.current_callable = None  # wrappers have a copy of what is in the graph's dictionary
        self.before, self.after = before, after
        self.calls = 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        return self.after(self.__wrapped__(self.before(inputs)))


def added(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    x += 1
    return x * count, y + 1


def check(function: Callable[..., Any]) -> None:
    for count in (2, 3, 1000):
        x, y = torch.arange(3.0), torch.ones(2)
        product, total = function(x, y, count)
        assert x.tolist() == [1, 2, 3]  # written to in place, once
        assert product.tolist() == [count, 2 * count, 3 * count]
        assert total.tolist() == [2, 2]


@torch.no_grad()
def test_wrappers_that_change_nothing_are_called_once() -> None:
    wrapper = Wrapper(Graph(added))
    check(without_wrappers(wrapper))
    assert wrapper.calls == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"after": lambda outputs: [outputs[0], outputs[1].view(2)]},
        {"after": lambda outputs: [outputs[0].clone(), outputs[1]]},
        {"before": lambda inputs: [inputs[0], inputs[1].clone(), inputs[2]]},
    ],
)
@torch.no_grad()
def test_wrappers_that_change_something_are_always_called(changed: dict[str, Any]) -> None:
    wrapper = Wrapper(Graph(added), **changed)
    check(without_wrappers(wrapper))
    assert wrapper.calls == 3


@torch.no_grad()
def test_an_input_more_or_an_output_less_is_a_change() -> None:
    weight = torch.tensor(2.0)
    more = Wrapper(Graph(lambda w, x: (w * x,)), before=lambda inputs: [weight, *inputs])
    less = Wrapper(Graph(lambda x: (x * 2, x)), after=lambda outputs: list(outputs[:1]))
    for wrapper in (more, less):
        function = without_wrappers(wrapper)
        assert [function(torch.tensor(float(n)))[0].item() for n in range(3)] == [0, 2, 4]
        assert wrapper.calls == 3


def test_gradients_are_the_wrappers_to_see_to() -> None:
    wrapper = Wrapper(Graph(added))
    function = without_wrappers(wrapper)
    check(function)
    assert wrapper.calls == 3
    with torch.no_grad():
        check(function)
    assert wrapper.calls == 4
    with torch.enable_grad():
        check(function)
    assert wrapper.calls == 7


@torch.no_grad()
def test_a_thread_that_comes_between_waits_for_nothing() -> None:
    """Its call goes through the wrappers, and what is seen is seen at a later call."""
    results = list[float]()

    def call(x: Tensor) -> tuple[Tensor]:
        if not results:
            results.append(0.0)
            thread = threading.Thread(target=between)
            thread.start()
            thread.join()
        return (x + 1,)

    @torch.no_grad()
    def between() -> None:
        results.append(function(torch.tensor(5.0))[0].item())

    wrapper = Wrapper(Graph(call))
    function = without_wrappers(wrapper)
    assert function(torch.tensor(1.0))[0].item() == 2
    assert results == [0, 6]
    assert [function(torch.tensor(float(n)))[0].item() for n in range(3)] == [1, 2, 3]
    assert wrapper.calls == 3


def test_a_call_that_fails_leaves_the_graph_as_it_was() -> None:
    def fails(x: Tensor) -> tuple[Tensor]:
        raise ValueError(x.shape)

    graph = Graph(fails)
    before = graph.current_callable
    with torch.no_grad(), pytest.raises(ValueError, match="2"):
        without_wrappers(Wrapper(graph))(torch.ones(2))
    assert graph.current_callable is before


def test_other_functions_are_what_they_were() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (x,)

    assert without_wrappers(function) is function


# Inductor itself ---------------------------------------------------------------------------------


def compiled(function: Any, *examples: Tensor) -> Callable[..., Any]:
    backend = torch._dynamo.lookup_backend("inductor")
    made: Callable[..., Any] = backend(fx.symbolic_trace(function), list(examples))
    return made


@pytest.mark.skipif(find_cpp_compiler() is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("direct", [True, False])
@torch.no_grad()
def test_what_inductor_gives(direct: bool) -> None:
    """A new value needs no wrapper; a view of an input is made by one."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (x.cos() + 1,) if direct else (x.cos() + 1, x[1:])

    x = torch.arange(3.0)
    run = without_wrappers(compiled(function, x))
    cells = dict(zip(run.__code__.co_freevars, run.__closure__ or (), strict=True))
    for n in range(3):
        x = torch.arange(3.0) + n
        torch.testing.assert_close(tuple(run(x)), function(x))
    assert (cells["call"].cell_contents is not None) == direct
