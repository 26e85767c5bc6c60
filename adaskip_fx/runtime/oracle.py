"""The reference: an eager model with some sublayers replaced, seen from outside its modules.

The output of a branch's last module is handed on as a tensor that remembers which branch it is,
through factors, dropouts, norms and views, until it is added to something. What it is added to is
the residual stream: there the branch is left out, or the stream before and after is noted. Nothing
of the passes is used here, neither their graph nor what they found in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adaskip_fx.kv_cache.argument_names import CACHE_NAMES
from adaskip_fx.plans.surrogate import EPS, Surrogate
from adaskip_fx.runtime.oracle_windows import Heads, layer_path, looking
from adaskip_fx.utils.torch_internals import as_subclass

_ADDS = frozenset(
    [
        *(torch.add, torch.Tensor.add, torch.Tensor.add_),
        *(torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__),
    ]
)
#: What stands in for a sublayer: None hands the stream on, a number is a factor on it.
Skips = Mapping[str, Surrogate | float | None]


@dataclass
class Oracle:
    """An eager model whose sublayers can be left out.

    Attributes:
        model: any decoder; hooks are put on its modules in `watching`, and taken off again.
        modules: for each sublayer (``"3.ffn"``), in the order of the residual stream, the path of
            the module whose output is its branch (``model.layers.3.mlp``), or the paths of the
            modules whose sum it is.
        prefill, decode: what is left out of prompts, and of single tokens after them.
        prefill_windows, decode_windows: what attention sees there, by K/V head; those that are
            missing see everything.
        streams: for each sublayer, the residual stream before and after it in the last forward.
    """

    model: nn.Module
    modules: Mapping[str, str | Sequence[str]]
    prefill: Skips = field(default_factory=dict)
    decode: Skips = field(default_factory=dict)
    prefill_windows: Mapping[str, Heads] = field(default_factory=dict)
    decode_windows: Mapping[str, Heads] = field(default_factory=dict)
    streams: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _decoding: bool = field(default=False, repr=False)
    _calls: Counter[nn.Module] = field(default_factory=Counter, repr=False)

    def __post_init__(self) -> None:
        self._order = {name: i for i, name in enumerate(self.modules)}

    @contextmanager
    def watching(self) -> Iterator[Oracle]:
        """Meanwhile the model leaves out what it should, and `streams` are noted."""
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        names: dict[nn.Module, list[str]] = {}  # several where layers share a module
        for name, paths in self.modules.items():
            for path in (paths,) if isinstance(paths, str) else paths:
                names.setdefault(self.model.get_submodule(path), []).append(name)
        try:
            for module, its in names.items():
                handles.append(module.register_forward_hook(self._mark(its)))
            windowed = {*self.prefill_windows, *self.decode_windows}
            layers = {name: layer_path(self.modules[name]) for name in sorted(windowed)}
            with looking(self.model, layers, self._heads) if layers else nullcontext():
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _heads(self, name: str) -> Heads | None:
        """What a sublayer's attention sees now."""
        return (self.decode_windows if self._decoding else self.prefill_windows).get(name)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("input_ids"), *args[:1], kwargs.get("inputs_embeds"))
        ids = next((tokens for tokens in given if tokens is not None), None)
        cache = next((kwargs[n] for n in CACHE_NAMES if n in kwargs), None)
        self.begin(decoding=ids is not None and ids.shape[1] == 1 and _filled(cache))

    def begin(self, decoding: bool) -> None:
        """A forward begins; called by a hook of the model, and by who calls its forward itself.

        decoding: which of `prefill` and `decode` is left out.
        """
        self._decoding = decoding
        self.streams, self._calls = {}, Counter()

    def _mark(self, names: Sequence[str]) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            name = names[self._calls[module] % len(names)]
            self._calls[module] += 1
            tensor = output[0] if isinstance(output, tuple) else output
            marked = _Branch.of(self, ((name, tensor),))
            return (marked, *output[1:]) if isinstance(output, tuple) else marked

        return hook

    def join(
        self,
        stream: torch.Tensor,
        parts: Sequence[tuple[str, torch.Tensor]],
        total: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The stream after some branches; `total` makes the sum that the model would make."""
        if all(name in self.streams for name, _ in parts):
            return total()  # it was added to the stream before: somebody else reads it as well
        skips = self.decode if self._decoding else self.prefill
        ordered = sorted(parts, key=lambda part: self._order[part[0]])
        for number, (name, branch) in enumerate(ordered):
            before = stream
            if name in skips:
                stream = replaced(before, skips[name])
            else:
                whole = number == len(ordered) - 1 and not skips.keys() & dict(ordered).keys()
                stream = total() if whole else before + branch
            self.streams[name] = (before, stream)
        return stream


def replaced(stream: torch.Tensor, by: Surrogate | float | None) -> torch.Tensor:
    """What a stream [..., H] becomes where a sublayer is left out, written out."""
    if by is None:
        return stream
    if not isinstance(by, Surrogate):
        return (stream.float() * by).to(stream.dtype)
    tensors = {n: torch.tensor(t, device=stream.device) for n, t in by.tensors.items()}
    if "factor" in tensors:
        return (stream.float() * tensors["factor"].float()).to(stream.dtype)
    narrow = {n: t.to(stream.dtype) for n, t in tensors.items()}
    if by.kind == "low_rank":
        return stream + ((stream @ narrow["down"].T) @ narrow["up"].T + narrow["bias"])
    inner = stream
    if by.kind == "normalized":
        inner = torch.nn.functional.rms_norm(stream.float(), stream.shape[-1:], eps=EPS)
    return stream + (inner.to(stream.dtype) @ narrow["weight"].T + narrow["bias"])


def _filled(cache: Any) -> bool:
    """Whether a cache holds tokens."""
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # it keeps states alone
        return bool(cache.has_previous_state())


class _Branch(torch.Tensor):
    """What branches make, on its way to the stream; several where they are added to each other."""

    oracle: Oracle
    parts: tuple[tuple[str, torch.Tensor], ...]
    plain: torch.Tensor

    @classmethod
    def of(cls, oracle: Oracle, parts: tuple[tuple[str, torch.Tensor], ...]) -> _Branch:
        plain = parts[0][1]
        for _, value in parts[1:]:
            plain = plain + value
        made = as_subclass(cls, plain)
        made.oracle, made.parts, made.plain = oracle, parts, plain
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        branches: list[_Branch] = [a for a in args if isinstance(a, _Branch)]
        if func in _ADDS and not kwargs and len(args) == 2:
            joined = _added(func, *args)
            if joined is not None:
                return joined
        names = {tuple(name for name, _ in branch.parts) for branch in branches}
        if len(names) != 1:
            return func(*map(_plain, args), **{k: _plain(v) for k, v in kwargs.items()})
        return _through(func, args, kwargs, branches[0])


def _plain(value: Any) -> Any:
    if isinstance(value, _Branch):
        return value.plain
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value


def _added(func: Any, left: Any, right: Any) -> Any:
    """A sum of branches, or the stream after them; None for another kind of sum."""
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return None
    if left.shape != right.shape:
        return None
    branch, other = (left, right) if isinstance(left, _Branch) else (right, left)
    assert isinstance(branch, _Branch)
    if isinstance(other, _Branch):
        if [name for name, _ in branch.parts] == [name for name, _ in other.parts]:
            (name, _), *more = branch.parts  # two terms of one branch
            if not more:
                return _Branch.of(branch.oracle, ((name, func(_plain(left), _plain(right))),))
        return _Branch.of(branch.oracle, (*branch.parts, *other.parts))
    before = other.clone()  # the sum may be made in its place
    return branch.oracle.join(before, branch.parts, lambda: func(_plain(left), _plain(right)))


def _through(func: Any, args: Any, kwargs: Any, branch: _Branch) -> Any:
    """What an operation makes of a branch: still one, if it has as many elements."""
    results = []
    for number, (name, _) in enumerate(branch.parts):
        given = [a.parts[number][1] if isinstance(a, _Branch) else _plain(a) for a in args]
        result = func(*given, **{k: _plain(v) for k, v in kwargs.items()})
        if not isinstance(result, torch.Tensor) or result.numel() != branch.numel():
            return result
        results.append((name, result))
    return _Branch.of(branch.oracle, tuple(results))
