"""What traced code looked at in Python: names within its arguments, and values outside of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_NAMES = re.compile(r"\w+")
_PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Reads:
    """What was read while tracing, and whether what is outside of the arguments is what it was.

    Attributes:
        names: every attribute and key that was read anywhere, by itself.
        sources: of values outside of the arguments (module globals, defaults, functions) and of
            functions among these, as Python text.
    """

    names: frozenset[str] = frozenset()
    sources: tuple[str, ...] = ()
    _terms: tuple[str, ...] = field(default=(), repr=False)
    _scope: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _alive: tuple[Any, ...] = field(default=(), repr=False)  # so that identities stay theirs
    _look: Callable[[], tuple[Any, ...]] = field(init=False, repr=False)
    _kept: tuple[Any, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        text = "".join(f"{term}," for term in self._terms)
        object.__setattr__(self, "_look", eval(f"lambda: ({text})", dict(self._scope)))
        object.__setattr__(self, "_kept", self._look())

    @classmethod
    def of(
        cls,
        guarded: Iterable[tuple[str, str]],
        scope: Mapping[str, Any],
        arguments: Mapping[str, Any],
    ) -> Reads:
        """Return what was read, by what Dynamo guards.

        Args:
            guarded: sources, and what was asked of them (see `dynamo.guarded`).
            scope: the traced function's globals.
            arguments: its arguments by name.
        """
        pairs = list(guarded)
        names = {name for pair in pairs for text in pair for name in _NAMES.findall(text)}
        functions = {k: v for k, v in arguments.items() if callable(v) and hasattr(v, "__code__")}
        roots = ("G[", *(f"L['{name}']" for name in functions))
        names_of = {**scope, "G": scope, "L": functions}
        sources, terms, alive = [], [], []
        for source in dict.fromkeys(s for s, _ in pairs if s.startswith(roots)):
            try:
                value, again = (eval(source, names_of) for _ in range(2))
            except Exception:  # written over something that only Dynamo's guards have
                continue
            if value is again or _plain(value):
                sources.append(source)
                terms.append(_term(source, value))
                alive.append(value)
        return cls(frozenset(names), tuple(sources), tuple(terms), names_of, tuple(alive))

    def beyond(self, known: Collection[str]) -> Reads:
        """Return the same without sources that are looked at anyway."""
        kept = [i for i, source in enumerate(self.sources) if source not in known]
        parts = (tuple(part[i] for i in kept) for part in (self.sources, self._terms, self._alive))
        sources, terms, alive = parts
        return Reads(self.names, sources, terms, self._scope, alive)

    def hold(self) -> bool:
        """Return whether the values outside of the arguments are what they were."""
        try:
            return self._look() == self._kept
        except Exception:  # what it is part of is gone
            return False

    def changed(self) -> list[str]:
        """Return the sources of values that are others now."""
        try:
            now = self._look()
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        triples = zip(self.sources, now, self._kept, strict=True)
        return [source for source, value, kept in triples if value != kept]


def readable(source: str) -> str:
    """Return a source as a user would write it: ``model.layers.1.mlp``, without dictionaries."""
    text = re.sub(r"\[list\(dict\.keys\(.*?\)\)\[(\d+)\]\]", r"[\1]", source)
    text = re.sub(r"\._modules\['([^']+)'\]", r".\1", text)
    text = re.sub(r"^L\['(?:model|self)'\]\.?", "", text)
    imported = re.fullmatch(r"G\['__import_(\w+)'\](.*)", text)
    return imported[1].replace("_dot_", ".") + imported[2] if imported else text


def _term(source: str, value: Any) -> str:
    """Return what is compared of a value: itself, or its identity and whether it is empty."""
    if _plain(value):
        return source
    empty = isinstance(value, dict | list | set) and not value
    return f"(id({source}), not {source})" if empty else f"id({source})"


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return isinstance(value, _PLAIN)
