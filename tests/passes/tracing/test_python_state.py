"""What is kept of a module tree's Python: every edit is seen, named, and gone when it is undone."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adaskip_passes.tracing.python_state import PythonState
from adaskip_passes.tracing.tensor_layout import describe_tensor, sharing


class Options:
    """An object that is no module."""

    def __init__(self) -> None:
        self.cap: float | None = 30.0
        self.kinds = ["full", "window"]
        self.nested = {"theta": [1.0, 2.0]}


class Layer(nn.Module):
    """With everything that a forward may look at."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.eps = 1e-5
        self.act: Any = torch.relu
        self.scaling = {"a": 1.0}
        self.active = ["a"]
        self.names = {"a"}
        self.linear = nn.Linear(3, 3)
        self.register_buffer("table", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) * self.scaling["a"] + self.eps


def shift(by: float, x: torch.Tensor) -> torch.Tensor:
    return x + by


def closure(value: float) -> Callable[..., Any]:
    """A hook that refers to a variable which can be set from outside."""

    def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * value

    def set_to(other: float) -> None:
        nonlocal value
        value = other

    hook.set_to = set_to  # type: ignore[attr-defined]
    return hook


class Hooked:
    """A hook that is a method of an object with state."""

    def __init__(self) -> None:
        self.factor = 2.0

    def hook(self, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * self.factor


@dataclass
class Tree:
    """A module tree and handles on what hangs on it."""

    root: nn.Module
    layers: list[Any]
    options: Options
    closure: Any
    hooked: Hooked

    @classmethod
    def make(cls) -> Tree:
        options = Options()
        layers = [Layer(options), Layer(options)]
        root = nn.Module()
        root.layers = nn.ModuleList(layers)
        root.config = options
        tree = cls(root, layers, options, closure(1.0), Hooked())
        layers[0].register_forward_hook(tree.closure)
        layers[1].linear.register_forward_hook(tree.hooked.hook)
        layers[1].act = functools.partial(shift, 1.0)
        return tree


def attribute(owner: Callable[[Tree], Any], name: str, value: Any) -> Any:
    """An edit that sets an attribute, and how it is undone."""

    def edit(tree: Tree) -> Callable[[], None]:
        target, absent = owner(tree), object()
        before = vars(target).get(name, absent)
        setattr(target, name, value)
        if before is absent:
            return lambda: delattr(target, name)
        return lambda: setattr(target, name, before)

    return edit


def entry(owner: Callable[[Tree], Any], key: Any, value: Any) -> Any:
    """Likewise an entry of a container."""

    def edit(tree: Tree) -> Callable[[], None]:
        target = owner(tree)
        before = target[key] if not isinstance(target, dict) or key in target else target
        target[key] = value
        if before is target:
            return lambda: target.pop(key)
        return lambda: target.__setitem__(key, before)

    return edit


def added(owner: Callable[[Tree], Any], value: Any) -> Any:
    def edit(tree: Tree) -> Callable[[], None]:
        owner(tree).append(value)
        return lambda: owner(tree).pop()

    return edit


def hook(register: str) -> Any:
    def edit(tree: Tree) -> Callable[[], None]:
        handle = getattr(tree.layers[0].linear, register)(lambda *given: None)
        return lambda: handle.remove()

    return edit


def variable(tree: Tree) -> Callable[[], None]:
    tree.closure.set_to(3.0)
    return lambda: tree.closure.set_to(1.0)


def of_another_class(tree: Tree) -> Callable[[], None]:
    class Other(Layer):
        pass

    tree.layers[0].__class__ = Other

    def undo() -> None:
        tree.layers[0].__class__ = Layer

    return undo


def method(tree: Tree) -> Callable[[], None]:
    before = Layer.forward
    Layer.forward = lambda self, x: x  # type: ignore[method-assign]

    def undo() -> None:
        Layer.forward = before  # type: ignore[method-assign]

    return undo


def exchanged(tree: Tree) -> Callable[[], None]:
    before = tree.root.layers[1]
    tree.root.layers[1] = Layer(tree.options)
    return lambda: tree.root.layers.__setitem__(1, before)


#: Each edit, and words that the first change it makes is named by.
EDITS: dict[str, tuple[Any, str]] = {
    "a number": (attribute(lambda t: t.layers[1], "eps", 1.0), "layers.1.eps"),
    "a function": (attribute(lambda t: t.layers[0], "act", torch.tanh), "layers.0.act"),
    "a new attribute": (attribute(lambda t: t.layers[0], "extra", 1), "layers.0.extra"),
    "forward on an instance": (
        attribute(lambda t: t.layers[0].linear, "forward", lambda x: x),
        "layers.0.linear.forward",
    ),
    "an entry": (entry(lambda t: t.layers[0].scaling, "a", 9.0), "layers.0.scaling.a"),
    "a new entry": (entry(lambda t: t.layers[0].scaling, "b", 9.0), "layers.0.scaling.b"),
    "a member of a list": (entry(lambda t: t.layers[1].active, 0, "b"), "layers.1.active"),
    "a longer list": (added(lambda t: t.layers[1].active, "b"), "layers.1.active"),
    "an object's attribute": (attribute(lambda t: t.options, "cap", None), "config.cap"),
    "deep in an object": (entry(lambda t: t.options.nested["theta"], 1, 3.0), "nested.theta"),
    "a forward hook": (hook("register_forward_hook"), "layers.0.linear._forward_hooks"),
    "a pre-hook": (hook("register_forward_pre_hook"), "layers.0.linear._forward_pre_hooks"),
    "a variable of a hook": (variable, "a variable of its closure"),
    "a hook's object": (
        attribute(lambda t: t.hooked, "factor", 3.0),
        "layers.1.linear._forward_hooks",
    ),
    "a class": (of_another_class, "layers.0.__class__"),
    "a method": (method, "Layer.forward"),
    "a module": (exchanged, "layers.1"),
    "a parameter's name": (
        entry(lambda t: t.layers[0].linear._parameters, "weight_2", nn.Parameter(torch.ones(1))),
        "layers.0.linear.weight_2",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_seen_and_named_and_can_be_undone(name: str) -> None:
    edit, words = EDITS[name]
    tree = Tree.make()
    state = PythonState(tree.root)
    assert state.holds()
    assert state.changes() == []
    undo = edit(tree)
    try:
        assert not state.holds()
        assert words in str(state.changes()[0])
    finally:
        undo()
    assert state.holds()
    assert state.changes() == []


@given(names=st.lists(st.sampled_from(sorted(EDITS)), max_size=4, unique=True))
def test_any_edits_together(names: list[str]) -> None:
    tree = Tree.make()
    state = PythonState(tree.root)
    undo = [EDITS[name][0](tree) for name in names]
    try:
        assert state.holds() == (not names)
        assert bool(state.changes()) == bool(names)
        assert PythonState(tree.root).holds()
    finally:
        for one in reversed(undo):
            one()
    assert state.holds()


def test_other_values_and_other_tensors_of_the_same_names_are_no_change() -> None:
    tree = Tree.make()
    state = PythonState(tree.root)
    before = state.tensors()
    with torch.no_grad():
        tree.layers[0].linear.weight.mul_(2.0)
    assert all(a is b for a, b in zip(before, state.tensors(), strict=True))
    tree.layers[0].linear.weight = nn.Parameter(torch.zeros(3, 3))
    tree.layers[1].table = torch.zeros(3)
    assert state.holds()
    slots = [".".join(slot) for slot in state.tensor_slots()]
    pairs = zip(slots, before, state.tensors(), strict=True)
    assert {n for n, a, b in pairs if a is not b} == {"layers.0.linear.weight", "layers.1.table"}


def test_what_code_may_see_of_a_change() -> None:
    """By the names that were read: an attribute's own; a container's too, whatever its keys."""
    tree = Tree.make()
    state = PythonState(tree.root)
    tree.layers[0].extra = 1
    (change,) = state.changes()
    assert not change.concerns({"eps", "layers"})
    assert change.concerns({"extra"})
    del tree.layers[0].extra
    tree.layers[0].scaling["b"] = 2.0
    (change,) = state.changes()
    assert change.concerns({"scaling"})
    assert not change.concerns({"eps", "layers"})
    del tree.layers[0].scaling["b"]
    tree.closure.set_to(5.0)
    (change,) = state.changes()
    assert change.concerns(set())


def test_what_is_left_out_is_not_followed() -> None:
    tree = Tree.make()
    tree.root.ours = Options()
    tree.root.theirs = Options()
    state = PythonState(tree.root, leave_out=["ours"])
    tree.root.ours.cap = 1.0
    assert state.holds()
    tree.root.theirs.cap = 1.0
    assert [str(c) for c in state.changes()] == ["theirs.cap"]


def test_functions_of_known_classes_are_not_looked_at() -> None:
    tree = Tree.make()
    state = PythonState(tree.root, known=[Layer])
    undo = method(tree)
    try:
        assert state.holds()
    finally:
        undo()


def test_a_change_that_cannot_be_compared_is_one() -> None:
    class Stubborn:
        def __eq__(self, other: object) -> bool:
            raise ValueError("cannot be compared")

        __hash__ = None  # type: ignore[assignment]

    tree = Tree.make()
    tree.layers[0].eps = Stubborn()
    state = PythonState(tree.root)
    assert state.holds()
    tree.layers[0].eps = Stubborn()
    assert not state.holds()
    assert [str(c) for c in state.changes()] == ["layers.0.eps"]


def test_the_order_of_hooks_is_looked_at() -> None:
    tree = Tree.make()
    linear = tree.layers[0].linear
    for factor in (2.0, 3.0):
        linear.register_forward_hook(closure(factor))
    state = PythonState(tree.root)
    linear._forward_hooks = OrderedDict(reversed(linear._forward_hooks.items()))
    assert not state.holds()


def test_hooks_that_are_registered_again_are_no_change() -> None:
    tree = Tree.make()
    linear = tree.layers[0].linear
    one, two = closure(2.0), closure(3.0)
    first = linear.register_forward_hook(one)
    second = linear.register_forward_hook(two, always_call=True)
    state = PythonState(tree.root)
    first.remove()
    assert [str(c) for c in state.changes()] == ["layers.0.linear._forward_hooks"]
    second.remove()
    linear.register_forward_hook(one)
    third = linear.register_forward_hook(two, always_call=True)
    assert state.holds()
    assert state.changes() == []
    third.remove()
    linear.register_forward_hook(two)
    assert not state.holds()


@pytest.mark.parametrize("before", [0, 1], ids=["the first hook", "beside another"])
def test_hooks_that_do_nothing_concern_nobody(before: int) -> None:
    root = nn.Sequential(nn.Linear(3, 3))
    for _ in range(before):
        root[0].register_forward_hook(closure(2.0))

    def idle(hook: object) -> bool:
        return hook is nothing

    def nothing(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        pass

    state = PythonState(root, idle=idle)
    root[0].register_forward_hook(nothing)
    (change,) = state.changes()
    assert not state.holds()
    assert change.idle
    assert not change.concerns({"_forward_hooks", *change.names})
    root[0].register_forward_hook(closure(3.0))  # the near miss
    assert any(c.concerns({"_forward_hooks", *c.names}) for c in state.changes())


def test_tensors_are_described_by_all_but_their_values() -> None:
    one = torch.ones(2, 3)
    assert describe_tensor(one) == describe_tensor(torch.zeros(2, 3))
    others = [one.double(), torch.ones(3, 2).t(), torch.ones(3, 2), nn.Parameter(one), None]
    assert len({describe_tensor(t) for t in (one, *others)}) == 6


def test_which_tensors_are_shared() -> None:
    one, other = torch.ones(1), torch.ones(1)
    assert sharing([one, other, one]) == (0, 1, 0)
    assert sharing([one, other, other]) == (0, 1, 1)
    assert sharing([one, other, torch.ones(1)]) == (0, 1, 2)
