"""What is done to a model between requests, each edit with what must come of it.

An edit is a function of a model, so that the same is done to the compiled model, to its original
and to the eager reference. What it changed is found by looking at all Python state before and
after (`Change`), and taken back exactly: state that was there before comes back as the same object.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

_ABSENT = object()
#: a group that all edits conflict with
EVERYTHING = "everything"


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of a model's state.

    Attributes:
        name: what it is.
        groups: what it touches; of edits that touch the same at most one is in force.
        apply: makes the change on a model that it is handed.
        kind: Python state, a tensor replaced by another, values in place (which all models that
            share them see at once), or adapters: Python state that is followed like a tensor. Of
            adapters at most one tree is changed at a time: what was changed in the compiled model
            alone is its own.
        compiled: what requests do while it is in force on the compiled model: run on a graph
            captured for it, either that or be refused, or be refused; None if it is not made there.
        original: what they do while it is in force on the original alone: be refused, follow it,
            be as if nothing had happened, or either of the first and last; None likewise.
        recorded: how often its hook, which has a side effect, has run since the process began.
        casts: whether models are of another dtype afterwards.
        writes: whether Python state is changed and values are written as well.
        written: makes the change on a model whose values were written already, if that is not
            `apply`.
    """

    name: str
    groups: tuple[str, ...]
    apply: Callable[[Any], None]
    kind: Literal["python", "tensor", "value", "adapter"] = "python"
    compiled: Literal["captured", "either", "refused"] | None = "captured"
    original: Literal["refused", "followed", "ignored", "either"] | None = "refused"
    recorded: Callable[[], int] | None = None
    casts: bool = False
    writes: bool = False
    written: Callable[[Any], None] | None = None

    def conflicts(self, other: Edit) -> bool:
        """Whether both touch the same."""
        return bool({*self.groups} & {*other.groups}) or EVERYTHING in (*self.groups, *other.groups)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis shows it."""
        printer.text(str(self))

    def __str__(self) -> str:
        return f"<{self.name}>"


# What was changed -------------------------------------------------------------------------------


class Change:
    """What a block did to a model's Python state, and how to take that back.

    State is what modules and the config hold, and what the plain containers among it hold. Values
    of tensors are not looked at.
    """

    def __init__(self, model: Any) -> None:
        self._before = [(c, copy.copy(c)) for c in _containers(model)]
        self._classes = [(module, type(module)) for module in model.modules()]
        self._undo: list[Callable[[], None]] = []

    def done(self) -> None:
        """The block has ended: find what it did."""
        for container, before in self._before:
            if isinstance(container, dict):
                self._undo += _differences(container, before)
            elif container != before:
                self._undo.append(lambda c=container, b=before: _refill(c, b))
        for module, kind in self._classes:
            if type(module) is not kind:
                self._undo.append(lambda m=module, k=kind: setattr(m, "__class__", k))
        self._before.clear()
        self._classes.clear()

    def undo(self) -> None:
        """Take it back."""
        for step in self._undo:
            step()
        self._undo.clear()


def _containers(model: Any) -> Iterator[Any]:
    """All dictionaries, lists and sets that a model's Python state is in."""
    seen = set[int]()
    holders = [*model.modules(), model.config, model.generation_config]
    for holder in holders:
        for container in (vars(holder), *vars(holder).values()):
            if isinstance(container, dict | list | set) and id(container) not in seen:
                seen.add(id(container))
                yield container


def _differences(now: dict[Any, Any], before: dict[Any, Any]) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    for key in [*before, *(k for k in now if k not in before)]:
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if old is _ABSENT:
            undo.append(lambda k=key: now.pop(k, None))
        elif old is not new:
            undo.append(lambda k=key, v=old: now.__setitem__(k, v))
    return undo


def _refill(container: Any, before: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


@dataclass
class Values:
    """The values of all tensors of a model, and whether they want gradients, to put back.

    Only what a block did to them is put back: another may be undone before it.
    """

    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]] = field(default_factory=list)
    written: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    wanted: list[tuple[torch.Tensor, bool]] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any) -> Values:
        tensors = (*model.parameters(), *model.buffers())
        return cls([(t, t.data, t.detach().clone(), t.requires_grad) for t in tensors])

    def done(self) -> None:
        """The block has ended: find what it did."""
        for tensor, data, values, wanted in self.kept:
            if not self._holds(tensor, values):
                self.written.append((tensor, data, values))
            if tensor.requires_grad != wanted:
                self.wanted.append((tensor, wanted))

    def hold(self) -> bool:
        """Whether all values are what they were."""
        return all(self._holds(tensor, values) for tensor, _, values, _ in self.kept)

    @staticmethod
    def _holds(tensor: torch.Tensor, values: torch.Tensor) -> bool:
        return tensor.dtype == values.dtype and torch.equal(tensor, values)

    def put_back(self) -> None:
        for tensor, data, values in self.written:
            tensor.data = data
            data.copy_(values)
        for tensor, wanted in self.wanted:
            tensor.requires_grad_(wanted)


# Hooks ------------------------------------------------------------------------------------------


def halved(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook that halves what a module gives."""
    return 0.5 * output


def doubled(module: nn.Module, args: Any) -> Any:
    """A pre-hook that doubles what a module is handed."""
    return (2 * args[0], *args[1:])


#: filled by `noted`
NOTED: dict[str, Any] = {"times": 0}


def noted(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that fills a dictionary at module level."""
    NOTED["times"] = NOTED["times"] + 1
    NOTED["last"] = output.detach().clone()


def _list_hook() -> tuple[Callable[..., None], Callable[[], int]]:
    """A hook that appends to a list of its closure, and how often it has."""
    outputs: list[torch.Tensor] = []

    def listed(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output.detach().sum())

    return listed, lambda: len(outputs)


class Other(nn.Module):
    """A branch of another class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, size in (("up", (8, width)), ("down", (width, 8))):
            weight = torch.empty(size).uniform_(-0.5, 0.5, generator=generator)
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return (hidden @ self.up.t()).relu() @ self.down.t()


class Halving(nn.Module):
    """A parametrization that halves a weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


# The edits --------------------------------------------------------------------------------------


def hooks(path: str) -> tuple[Edit, ...]:
    """Hooks on the module at `path`, whose output is one tensor."""
    listed, count = _list_hook()

    def on(register: str, hook: Callable[..., Any]) -> Callable[[Any], None]:
        return lambda model: getattr(model.get_submodule(path), register)(hook)

    def effect(name: str, hook: Callable[..., Any], recorded: Callable[[], int]) -> Edit:
        apply = on("register_forward_hook", hook)
        return Edit(name, (path,), apply, compiled="either", recorded=recorded)

    return (
        Edit("hook that halves", (path,), on("register_forward_hook", halved)),
        Edit("pre-hook that doubles", (path,), on("register_forward_pre_hook", doubled)),
        effect("hook that fills a list", listed, count),
        effect("hook that fills a global", noted, lambda: NOTED["times"]),
    )


def config(name: str, value: Any, **more: Any) -> Edit:
    """A value of the configuration."""
    return Edit(
        f"config.{name} = {value}", (name,), lambda m: setattr(m.config, name, value), **more
    )


def asked_of_config() -> tuple[Edit, ...]:
    """Outputs that the configuration asks for: given, or refused; the original's are its own."""
    more: dict[str, Any] = {"compiled": "either", "original": "either"}
    return (
        config("use_cache", False, **more),
        config("output_hidden_states", True, **more),
    )


def attribute(path: str, name: str, value: Any) -> Edit:
    """An attribute of a module. A module among them is made once: all trees are given the same."""
    inside = isinstance(value, nn.Module)
    text = type(value).__name__ if inside else value
    return Edit(
        f"{path}.{name} = {text}",
        (path if inside else f"{path}.{name}",),
        lambda model: setattr(model.get_submodule(path), name, value),
    )


def exchanged(model: Any, path: str) -> tuple[Edit, ...]:
    """The branch at `path` exchanged, for one of its class and for one of another class."""
    like = copy.deepcopy(model.get_submodule(path))
    with torch.no_grad():
        for parameter in like.parameters():
            parameter.copy_(parameter.flip(0))
    other = Other(model.config.hidden_size)

    def put(module: nn.Module) -> Callable[[Any], None]:
        parent, name = path.rsplit(".", 1)
        return lambda model: setattr(model.get_submodule(parent), name, module)

    return (
        Edit("branch of the same class", (path, "tensors"), put(like)),
        Edit("branch of another class", (path, "tensors"), put(other), compiled="either"),
    )


def shorter(layers: str) -> Edit:
    """The last layer taken away."""

    def apply(model: Any) -> None:
        del model.get_submodule(layers)[-1]

    return Edit("last layer deleted", (EVERYTHING,), apply, compiled="either")


def tensors(model: Any, path: str) -> tuple[Edit, ...]:
    """Parameters and buffers replaced by others, and written to. `path`: of a linear module.

    Each model gets tensors of its own, as it would from two people.
    """
    with torch.no_grad():
        old = model.get_submodule(path).weight
        weight = 0.5 * old
        state = {name: 0.8 * t.detach() for name, t in model.state_dict().items()}
    found = next(((n, b) for n, b in model.named_buffers() if n.endswith(".inv_freq")), None)

    def assign(model: Any) -> None:
        model.get_submodule(path).weight = nn.Parameter(weight.clone(), requires_grad=False)

    def load(model: Any) -> None:
        model.load_state_dict(state, strict=False, assign=True)  # adapters come and go
        model.requires_grad_(False)

    def write(model: Any) -> None:
        with torch.no_grad():
            model.get_submodule(path).weight.mul_(0.5)

    def there_and_back(model: Any) -> None:
        model.to(torch.bfloat16)
        model.to(torch.float32)

    made = [
        Edit("parameter replaced", ("tensors",), assign, "tensor", original="followed"),
        Edit("load_state_dict(assign=True)", ("tensors",), load, "tensor", original="followed"),
        Edit("parameter written in place", ("tensors",), write, "value"),
    ]
    if found is not None:
        name, buffer = found
        owner, halved_buffer = name.rsplit(".", 1)[0], 0.5 * buffer

        def replace_buffer(model: Any) -> None:
            model.get_submodule(owner).inv_freq = halved_buffer.clone()

        made.append(
            Edit("buffer replaced", ("tensors",), replace_buffer, "tensor", original="followed")
        )
        # a cast of the original casts what it has: not an adapter that one of the others has alone
        touched = ("tensors", "adapter")
        made.append(
            Edit(
                "to(bfloat16)",
                touched,
                lambda model: model.to(torch.bfloat16),
                "tensor",
                None,
                "followed",
                casts=True,
            )
        )
        made.append(
            Edit("to(bfloat16) and back", touched, there_and_back, "tensor", None, "followed")
        )
    return tuple(made)


def only_on_the_original(path: str) -> tuple[Edit, ...]:
    """What is done to a model that is trained or pruned further. `path`: of a linear module."""

    def parametrized(model: Any) -> None:
        linear = model.get_submodule(path)
        parametrize.register_parametrization(linear, "weight", Halving())

    def pruned(model: Any) -> None:
        prune.l1_unstructured(model.get_submodule(path), "weight", amount=0.5)

    def new_head(model: Any) -> None:
        head = copy.deepcopy(model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.flip(0), requires_grad=False)
        model.set_output_embeddings(head)

    return (
        Edit("weight parametrized", ("tensors",), parametrized, compiled=None),
        Edit("weight pruned", ("tensors",), pruned, compiled=None),
        Edit("other output embeddings", ("tensors",), new_head, compiled=None),
    )


def own_to_each() -> tuple[Edit, ...]:
    """What each model has for itself."""
    return (
        Edit("train()", ("train",), lambda m: m.train(), compiled="refused", original="ignored"),
        Edit(
            "set_attn_implementation('eager')",
            ("attention",),
            lambda m: m.set_attn_implementation("eager"),
            compiled=None,
            original="ignored",
        ),
        Edit(
            "requires_grad_(True)",
            ("grad",),
            lambda m: m.requires_grad_(True),
            "value",
            compiled=None,
            original="ignored",
        ),
    )


def adapters(targets: tuple[str, ...]) -> tuple[Edit, ...]:
    """LoRA adapters of a model that has "a" (active) and "b"; see `with_adapters`."""

    def scaled(model: Any) -> None:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["a"] = 9.0

    def merged(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "merged_adapters"):
                module.merge(adapter_names=["a"])

    def said_to_be_merged(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "merged_adapters"):
                module.merged_adapters = ["a"]

    def deleted(model: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Adapter a was active which is now deleted")
            model.delete_adapter("a")

    def added(model: Any) -> None:
        add_adapter(model, "c", targets)
        model.set_adapter("c")

    def edit(name: str, apply: Callable[[Any], None]) -> Edit:
        return Edit(name, ("adapter",), apply, "adapter", original="followed")

    return (
        edit("set_adapter('b')", lambda m: m.set_adapter("b")),
        edit("disable_adapters()", lambda m: m.disable_adapters()),
        edit("scaling['a'] = 9", scaled),
        edit("delete_adapter('a')", deleted),
        Edit(
            "merge_adapter()",
            ("adapter", "tensors"),
            merged,
            "adapter",
            compiled=None,
            original="followed",
            writes=True,
            written=said_to_be_merged,
        ),
        edit("add_adapter('c')", added),
    )


def add_adapter(model: Any, name: str, targets: tuple[str, ...]) -> None:
    """Add a LoRA adapter whose weights depend on its name only."""
    import peft

    rank = peft.LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        try:
            model.add_adapter(rank, name)
        except ValueError as error:  # transformers 5.24 wants peft 0.22
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
    generator = torch.Generator().manual_seed(ord(name))
    for place, parameter in model.named_parameters():
        if f".{name}." in place:
            with torch.no_grad():
                parameter.uniform_(-0.3, 0.3, generator=generator)
            parameter.requires_grad_(False)


def with_adapters(model: Any, targets: tuple[str, ...]) -> Any:
    """The same model with adapters "a", which is active, and "b"."""
    for name in ("a", "b"):
        add_adapter(model, name, targets)
    model.set_adapter("a")
    return model.eval().requires_grad_(False)
