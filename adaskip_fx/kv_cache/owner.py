"""What a cache needs of the runtime that made it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .buffer_pool import BufferPool

if TYPE_CHECKING:
    from .cache import SkipCache


class Owner(Protocol):
    """The runtime of a compiled model: it leases buffers to caches, and counts those that live."""

    buffer_pool: BufferPool

    @property
    def model(self) -> Any:
        """The compiled model whose keys and values are stored."""

    def track(self, cache: SkipCache) -> None:
        """Count a cache among those that live."""

    def save_cache(self, cache: SkipCache, path: str | Path) -> None:
        """Write what a cache stores to a file."""
