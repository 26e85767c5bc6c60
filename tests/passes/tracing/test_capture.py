"""Capture: one graph, its inputs by source, its guards, and no Dynamo afterwards."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import TrackedFake

from adaskip_passes import UnsupportedError, capture, fuse, link
from adaskip_passes.tracing.capture import Capture, ShapeGuards
from tests.support.fx_decoders import (
    ROOM,
    Cut,
    Decoder,
    Shape,
    arguments,
    call,
    cut,
    mark_lengths,
    shared,
    step,
    trace,
)
from tests.support.fx_reference import eager, same

TABLE = torch.arange(5.0)


class Box:
    """An argument with Python state."""

    def __init__(self) -> None:
        self.number = 1
        self.items: list[int] = []


def dynamic(*sizes: int, dim: int = 0) -> Tensor:
    tensor = torch.ones(*sizes)
    torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def readable(guards: ShapeGuards) -> set[str]:
    """The conditions with each symbol replaced by where it comes from."""
    found = set()
    for condition in guards.conditions:
        for symbol, source in guards.symbols.items():
            condition = condition.replace(symbol, source)
        found.add(condition)
    return found


# How often it traces ---------------------------------------------------------------------------


def scaled(x: Tensor, n: float) -> tuple[Tensor]:
    return (x * n,)


def lettered(x: Tensor, letters: str) -> tuple[Tensor]:
    return (x * len(letters),)


def test_twelve_captures_trace_twelve_times() -> None:
    """Neither the recompile limit of 8 nor a graph that was captured before stops a capture."""
    different = [trace(lettered, x=torch.ones(3), letters="a" * i) for i in range(6)]
    equal = [trace(lettered, x=torch.ones(3), letters="abc") for _ in range(6)]
    assert len({id(c.graph) for c in different + equal}) == 12
    results = [c.graph(torch.ones(1))[0].item() for c in different + equal]
    assert results == [0, 1, 2, 3, 4, 5, *[3] * 6]


def test_torch_compile_alone_would_not() -> None:
    """What the test above would see without a code object for each capture."""
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(lettered, backend=backend, fullgraph=True)
    for _ in range(3):
        compiled(torch.ones(3), "abc")
    assert len(traced) == 1
    for letters in "abcdefg":
        compiled(torch.ones(3), letters)
    assert len(traced) == 8
    with pytest.raises(Exception, match="fullgraph=True"):
        compiled(torch.ones(3), "h")


def test_models_of_equal_configuration_are_captured_one_by_one() -> None:
    shape = Shape(layers=1)
    one, two = (cut(Decoder(shape), shape) for _ in range(2))
    assert one.capture.graph is not two.capture.graph
    assert one.capture.sources == two.capture.sources
    assert str(one.capture.graph.graph) == str(two.capture.graph.graph)


def test_the_function_is_not_run() -> None:
    shape = Shape(layers=1)
    args = arguments(Decoder(shape), shape)
    before = [t.clone() for t in args["memory"].tensors()]
    trace(step, **args)
    assert all(torch.equal(a, b) for a, b in zip(before, args["memory"].tensors(), strict=True))
    eager(args)
    assert not torch.equal(before[0], args["memory"].tensors()[0])


# Running without Dynamo ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda c: link(c.outer, c.compiler), lambda c: fuse(c.outer)])
def test_programs_run_without_dynamo(make: Callable[[Cut], Callable[..., Any]]) -> None:
    got = shared(Shape())
    program = make(got)
    frames, stats = dict(counters["frames"]), dict(counters["stats"])
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (2, 9, 30):
            call(program, got, got.outer.graph, arguments(got.model, got.shape, tokens))
    assert (dict(counters["frames"]), dict(counters["stats"])) == (frames, stats)


def test_a_compiled_function_does_not() -> None:
    """The stance and the counters above see Dynamo when it is at work."""
    compiled = torch.compile(scaled, backend="eager")
    before = counters["frames"]["total"]
    compiled(torch.ones(3), 1.0)
    assert counters["frames"]["total"] > before
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="Detected recompile"),
    ):
        compiled(torch.ones(3, dtype=torch.float64), 1.0)


# Sources ---------------------------------------------------------------------------------------


def test_sources_bind_every_tensor_once() -> None:
    got = shared(Shape())
    args = arguments(got.model, got.shape)
    bound = got.capture.binder(got.capture.sources)(args)
    tensors = [id(v) for v in bound if isinstance(v, Tensor)]
    model, memory = got.model, args["memory"]
    expected = [*model.parameters(), *model.buffers(), *memory.tensors(), args["ids"]]
    assert sorted(tensors) == sorted(id(t) for t in expected)
    assert [v for v in bound if not isinstance(v, Tensor)] == [7, 7]


def test_sources_bind_another_model_and_another_cache() -> None:
    """Each value goes to its own place: other weights of the same shapes, their own result."""
    got = shared(Shape())
    other = Decoder(got.shape)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    args, twin = arguments(other, got.shape, 5, seed=3), arguments(other, got.shape, 5, seed=3)
    logits = call(got.capture.graph, got, got.capture.graph.graph, args)[0]
    assert torch.equal(logits, eager(twin))
    assert same(args, twin)
    assert not torch.equal(logits, eager(arguments(got.model, got.shape, 5, seed=3)))


def test_binder_of_one_and_of_no_source() -> None:
    got = trace(scaled, x=torch.ones(3), n=2.0)
    x = torch.ones(3)
    assert got.binder(["L['x']"])({"x": x}) == (x,)
    assert got.binder([])({}) == ()
    assert got.binder(["L['x']", "L['n']"])({"x": x, "n": 4}) == (x, 4)


def with_default(x: Tensor, n: float = 2.0) -> tuple[Tensor]:
    return (x * n,)


def with_keyword_default(x: Tensor, *, n: float = 2.0) -> tuple[Tensor]:
    return (x * n,)


@pytest.mark.parametrize("function", [with_default, with_keyword_default])
def test_defaults_are_the_functions_own(function: Callable[..., Any]) -> None:
    assert trace(function, x=torch.ones(1)).graph(torch.ones(1))[0].item() == 2.0


def reads_a_global(x: Tensor) -> tuple[Tensor]:
    return (x + TABLE,)


def test_sources_may_be_globals_of_the_function() -> None:
    got = trace(reads_a_global, x=torch.ones(5))
    bound = got.binder(got.sources)({"x": torch.ones(5)})
    assert torch.equal(got.graph(*bound)[0], 1 + TABLE)


# Symbolic lengths ------------------------------------------------------------------------------


@given(st.data())
def test_one_capture_serves_all_lengths(data: st.DataObject) -> None:
    got = shared(Shape())
    tokens = data.draw(st.integers(2, ROOM - 1), "tokens")
    filled = data.draw(st.integers(tokens, ROOM - 1), "filled")
    args = arguments(got.model, got.shape, tokens, filled, seed=tokens)
    twin = arguments(got.model, got.shape, tokens, filled, seed=tokens)
    assert got.capture.shape_guards().hold(args)
    logits = call(got.capture.graph, got, got.capture.graph.graph, args)[0]
    assert torch.equal(logits, eager(twin))
    assert same(args, twin)


@given(st.integers(2, ROOM))
def test_one_decode_capture_serves_all_cache_lengths(filled: int) -> None:
    got = shared(Shape(), 1, 9)
    args = arguments(got.model, got.shape, 1, filled, seed=filled)
    twin = arguments(got.model, got.shape, 1, filled, seed=filled)
    assert got.capture.shape_guards().hold(args)
    logits = call(got.capture.graph, got, got.capture.graph.graph, args)[0]
    assert torch.equal(logits, eager(twin))
    assert same(args, twin)


def test_unmarked_lengths_are_constants() -> None:
    """The lengths above are symbolic because they were marked."""
    shape = Shape(layers=1)
    model = Decoder(shape)
    got = trace(step, **arguments(model, shape))
    assert got.shape_guards().symbols == {}
    bound = got.binder(got.sources)(arguments(model, shape, 9))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        got.graph(*bound)


# Shape guards ----------------------------------------------------------------------------------


def plus_one(x: Tensor) -> tuple[Tensor]:
    return (x + 1,)


def needs_equal(x: Tensor, y: Tensor) -> tuple[Tensor]:
    if x.shape[0] != y.shape[0]:
        raise ValueError("lengths differ")
    return (x.sum() + y.sum(),)


def turns_at_nine(x: Tensor) -> tuple[Tensor]:
    return (x + 1,) if x.shape[0] == 9 else (x - 1,)


def turns_at_five(x: Tensor) -> tuple[Tensor]:
    return (x + 1,) if x.shape[0] == 5 else (x - 1,)


def has_room(x: Tensor, buffer: Tensor) -> tuple[Tensor]:
    return (buffer.narrow(0, 0, x.shape[0]) + 1,)


X = "L['x'].size()[0]"


def test_a_range_is_a_guard() -> None:
    guards = trace(has_room, x=dynamic(5), buffer=torch.ones(16)).shape_guards()
    assert {f"2 <= {X}", f"{X} <= 16"} <= readable(guards)
    for length, holds in ((2, True), (16, True), (1, False), (17, False)):
        args = {"x": torch.ones(length), "buffer": torch.ones(16)}
        assert guards.hold(args) is holds
        assert bool(guards.broken(args)) is not holds


def test_broken_says_which_condition() -> None:
    guards = trace(has_room, x=dynamic(5), buffer=torch.ones(16)).shape_guards()
    (symbol,) = guards.symbols
    assert guards.symbols[symbol] == X
    args = {"x": torch.ones(1), "buffer": torch.ones(16)}
    assert guards.broken(args) == [f"2 <= {symbol}"]
    assert f"{symbol} <= 16" in guards.broken({**args, "x": torch.ones(20)})
    assert guards.broken({**args, "x": torch.ones(16)}) == []


def test_equality_of_two_lengths_is_a_guard() -> None:
    guards = trace(needs_equal, x=dynamic(5), y=dynamic(5)).shape_guards()
    assert set(guards.symbols.values()) == {X, "L['y'].size()[0]"}
    assert guards.hold({"x": torch.ones(6), "y": torch.ones(6)})
    unequal = {"x": torch.ones(6), "y": torch.ones(7)}
    assert not guards.hold(unequal)
    (broken,) = guards.broken(unequal)
    assert "==" in broken


def test_lengths_that_nothing_compares_may_differ() -> None:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor]:
        return (x.sum() + y.sum(),)

    guards = trace(both, x=dynamic(5), y=dynamic(5)).shape_guards()
    assert guards.hold({"x": torch.ones(6), "y": torch.ones(7)})


def test_the_branch_not_taken_is_a_guard() -> None:
    got = trace(turns_at_nine, x=dynamic(5))
    assert f"{X} != 9" in readable(got.shape_guards())
    assert not got.shape_guards().hold({"x": torch.ones(9)})
    assert got.shape_guards().hold({"x": torch.ones(8)})


def test_a_length_marked_dynamic_must_not_become_constant() -> None:
    message = r"turns_at_five is only right where x\.shape\[0\] is 5, a length that must"
    with pytest.raises(UnsupportedError, match=message):
        trace(turns_at_five, x=dynamic(5))


@pytest.mark.parametrize("function", [plus_one, turns_at_five])
def test_what_was_switched_off_is_on_again(function: Callable[..., Any]) -> None:
    """Whether it traced or was refused; a backend that stays in Dynamo sees stacks."""
    with contextlib.suppress(UnsupportedError):
        trace(function, x=dynamic(5))
    stacks: list[str] = []

    def backend(graph: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        stacks.extend(n.stack_trace or "" for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    torch.compile(scaled, backend=backend, fullgraph=True)(torch.ones(3), 2.5)
    assert "return (x * n,)" in stacks[0]
    assert gc.isenabled()
    assert torch._dynamo.config.run_gc_after_compile


def test_a_length_that_became_constant_is_a_guard() -> None:
    x = torch.ones(5)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    guards = trace(turns_at_five, x=x).shape_guards()
    assert readable(guards) == {f"{X} == 5"}
    assert guards.hold({"x": torch.ones(5)})
    assert not guards.hold({"x": torch.ones(6)})


def test_a_symbolic_stride_is_looked_up() -> None:
    def flat(x: Tensor) -> tuple[Tensor]:
        return (x.transpose(0, 1).reshape(-1) + 1,)

    view = torch.ones(4, 40)[:, :9]
    torch._dynamo.mark_dynamic(view, 1)
    guards = trace(flat, x=view).shape_guards()
    assert "L['x'].size()[1]" in guards.symbols.values()
    assert guards.hold({"x": torch.ones(4, 64)[:, :20]})
    assert not guards.hold({"x": torch.ones(4, 64)[:, :1]})


def test_no_symbols_no_guards() -> None:
    got = trace(plus_one, x=torch.ones(5))
    assert got.shape_guards().conditions == ()
    assert got.shape_guards().hold({})
    assert got.shape_guards().broken({}) == []


def test_the_length_of_the_cache_is_guarded() -> None:
    got = shared(Shape())
    guards = got.capture.shape_guards()
    assert guards.hold(arguments(got.model, got.shape, 2))
    one = arguments(got.model, got.shape, 1)
    assert not guards.hold(one)
    assert all(condition.startswith("2 <=") for condition in guards.broken(one))


# What is refused -------------------------------------------------------------------------------


def breaks(x: Tensor) -> tuple[Tensor]:
    torch._dynamo.graph_break()
    return (x + 1,)


def depends_on_data(x: Tensor) -> tuple[Tensor]:
    return (x + 1,) if x.sum() > 0 else (x - 1,)


def raises(x: Tensor) -> tuple[Tensor]:
    raise ValueError("not this one")


def returns_a_constant(x: Tensor) -> int:
    return 1


@pytest.mark.parametrize("function", [breaks, depends_on_data, raises])
def test_what_is_not_one_graph_is_refused_by_name(function: Callable[..., Any]) -> None:
    with pytest.raises(
        UnsupportedError,
        match=rf"torch.compile cannot capture {function.__name__} as one graph: .+"
        r"The model's forward must be traceable with fullgraph=True; "
        r"run it under torch.compile\(fullgraph=True\) to see where it breaks\.",
    ) as caught:
        trace(function, x=torch.ones(3))
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_missing_arguments_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="missing 1 required positional argument: 'n'"):
        trace(scaled, x=torch.ones(3))


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_dynamo_switched_off_is_refused(stance: Any) -> None:
    with (
        torch.compiler.set_stance(stance),
        pytest.raises(
            UnsupportedError, match=r"ran plus_one without compiling it\. Is Dynamo switched"
        ),
    ):
        trace(plus_one, x=torch.ones(3))
    assert trace(plus_one, x=torch.ones(3)).sources == ("L['x']",)


def test_dynamo_disabled_in_the_environment_is_refused() -> None:
    """``config.disable`` is what TORCH_COMPILE_DISABLE=1 sets when torch is imported."""
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(UnsupportedError, match="TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE"),
    ):
        trace(plus_one, x=torch.ones(3))


def test_a_graph_without_operations_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="ran returns_a_constant without compiling it"):
        trace(returns_a_constant, x=torch.ones(3))


# Python side effects ---------------------------------------------------------------------------


def sets_a_number(box: Box, x: Tensor) -> tuple[Tensor]:
    box.number = 2
    return (x + box.number,)


def appends(box: Box, x: Tensor) -> tuple[Tensor]:
    box.items.append(3)
    return (x + 1,)


def reads(box: Box, x: Tensor) -> tuple[Tensor]:
    return (x + box.number + len(box.items),)


def test_python_effects_on_arguments_are_recorded_and_not_done() -> None:
    box = Box()
    (changed,) = trace(sets_a_number, box=box, x=torch.ones(3)).python_effects
    assert changed.startswith("L['box']")
    assert trace(appends, box=box, x=torch.ones(3)).python_effects == ("L['box'].items",)
    assert (box.number, box.items) == (1, [])


def swaps(table: dict[str, int], x: Tensor) -> tuple[Tensor]:
    before = table["factor"]
    table.update(factor=3)
    try:
        return (x * table["factor"],)
    finally:
        table["factor"] = before


def swaps_and_adds(table: dict[str, int], x: Tensor) -> tuple[Tensor]:
    result = swaps(table, x)
    table["more"] = 1
    return result


def swaps_and_leaves(table: dict[str, int], x: Tensor) -> tuple[Tensor]:
    result = swaps(table, x)
    table["factor"] = 4
    return result


def swaps_and_removes(table: dict[str, int], x: Tensor) -> tuple[Tensor]:
    result = swaps(table, x)
    del table["other"]
    return result


def test_a_dictionary_that_holds_again_what_it_held_is_not_changed() -> None:
    table = {"factor": 2, "other": 5}
    assert trace(swaps, table=table, x=torch.ones(3)).python_effects == ()
    for changing in (swaps_and_adds, swaps_and_leaves, swaps_and_removes):
        assert trace(changing, table=table, x=torch.ones(3)).python_effects == ("L['table']",)
    assert table == {"factor": 2, "other": 5}


def test_reading_python_state_is_no_effect() -> None:
    assert trace(reads, box=Box(), x=torch.ones(3)).python_effects == ()
    assert shared(Shape()).capture.python_effects == ()


# What `build` does -----------------------------------------------------------------------------


class OwnError(Exception):
    pass


@pytest.mark.parametrize("error", [OwnError("mine"), UnsupportedError("layer 3"), TypeError("bad")])
def test_exceptions_of_build_come_out_as_they_are(error: Exception) -> None:
    def build(captured: Capture) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        capture(plus_one, {"x": torch.ones(3)}, build)
    assert caught.value is error
    assert caught.value.__cause__ is None


def test_what_build_returns_is_returned() -> None:
    assert capture(plus_one, {"x": torch.ones(3)}, lambda captured: "built") == "built"
    assert capture(plus_one, {"x": torch.ones(3)}, lambda captured: None) is None


def compare_length(captured: Capture, below: int) -> None:
    """What a compiler does that makes 32 bit indices."""
    node = next(
        n
        for n in captured.graph.graph.find_nodes(op="placeholder")
        if isinstance(n.meta["example_value"], Tensor)
    )
    assert node.meta["example_value"].shape[0] < below


def test_guards_recorded_while_building_count() -> None:
    def build(captured: Capture) -> Capture:
        compare_length(captured, 1000)
        return captured

    with torch.no_grad():
        got = capture(plus_one, {"x": dynamic(5)}, build)
    assert f"{X} < 1000" in readable(got.shape_guards()) or f"{X} <= 999" in readable(
        got.shape_guards()
    )
    assert got.shape_guards().hold({"x": torch.ones(999)})
    assert not got.shape_guards().hold({"x": torch.ones(1000)})


def test_guards_recorded_when_reopened_count() -> None:
    got = trace(plus_one, x=dynamic(5))
    assert got.shape_guards().hold({"x": torch.ones(1000)})
    with got.reopened():
        compare_length(got, 1000)
    assert not got.shape_guards().hold({"x": torch.ones(1000)})
    assert got.shape_guards().hold({"x": torch.ones(999)})


def test_reopened_closes_again_also_after_an_error() -> None:
    got = trace(plus_one, x=dynamic(5))
    assert got.shape_env is not None
    assert got.shape_env.frozen

    def inside() -> None:
        assert got.shape_env is not None
        with got.reopened():
            assert torch._guards.TracingContext.get() is got.tracing
            assert not got.shape_env.frozen
            raise OwnError

    with pytest.raises(OwnError):
        inside()
    assert got.shape_env.frozen
    assert torch._guards.TracingContext.try_get() is None


def test_reopened_inside_its_own_capture_changes_nothing() -> None:
    def build(captured: Capture) -> tuple[bool, bool]:
        before = torch._guards.TracingContext.try_get()
        with captured.reopened():
            inside = torch._guards.TracingContext.try_get()
        after = torch._guards.TracingContext.try_get()
        return before is inside, before is after

    assert capture(plus_one, {"x": dynamic(5)}, build) == (True, True)


def test_a_capture_can_be_compiled_long_after() -> None:
    """Other captures in between; the pieces still compile, and for every length."""
    got = cut(Decoder(Shape(layers=1)), Shape(layers=1), backend="aot_eager")
    trace(plus_one, x=dynamic(5))
    with torch.no_grad():
        flat = got.compiler.compile(got.capture.graph)
    for tokens in (3, 20):
        args, twin = (arguments(got.model, got.shape, tokens) for _ in range(2))
        logits = call(flat, got, got.capture.graph.graph, args)[0]
        assert torch.equal(logits, eager(twin))
        assert same(args, twin)


def test_marks_are_the_callers() -> None:
    """Capturing marks no length by itself, so what is symbolic is said in one place."""
    args = arguments(Decoder(Shape(layers=1)), Shape(layers=1))
    assert trace(step, **args).shape_guards().symbols == {}
    mark_lengths(args)
    sources = trace(step, **args).shape_guards().symbols.values()
    assert set(sources) == {"L['ids'].size()[1]", "L['memory'].filled.size()[0]"}


def test_a_capture_dies_with_its_model() -> None:
    """Dynamo keeps the last backends that it was given, and must not keep graphs with them.

    Nor must the fake tensors of a trace stay, which torch ties to each other through C++.
    """

    def fakes() -> int:
        gc.collect()
        return sum(type(one) is TrackedFake for one in gc.get_objects())

    before = fakes()
    shape = Shape()
    got = cut(Decoder(shape), shape)
    watched = [weakref.ref(got.model), weakref.ref(got.capture.graph), weakref.ref(got.outer)]
    assert all(one() is not None for one in watched)
    del got
    assert fakes() <= before
    assert [one() for one in watched] == [None, None, None]


def exporting(x: Tensor) -> tuple[Tensor]:
    return (x + 1 if torch.compiler.is_exporting() else x * 3,)


def test_a_capture_is_not_an_export() -> None:
    """Models choose other code for one."""
    before = torch.compiler.is_exporting
    captured = trace(exporting, x=torch.ones(3))
    assert [n.name for n in captured.graph.graph.nodes if n.op == "call_function"] == ["mul"]
    assert torch.compiler.is_exporting is before
