"""The last tokens of a request read again, by another plan, and then as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .request_memory import RequestMemory


@contextmanager
def read_again(cache: RequestMemory, tokens: int) -> Iterator[None]:
    """Have the last `tokens` tokens of a request be new ones meanwhile; after it all is as it was.

    Raises:
        NotImplementedError: they cannot be taken back (`RequestMemory.keep_first`).
    """
    length, padded, begin = cache.length, cache.padded, cache.length - tokens
    written = [
        None if buffer is None else buffer[:, :, begin:length].clone()
        for buffer in (*cache.keys, *cache.values)
    ]
    cache.keep_first(begin)
    try:
        yield
    finally:
        for buffer, before in zip((*cache.keys, *cache.values), written, strict=True):
            if buffer is not None and before is not None:
                buffer[:, :, begin:length].copy_(before)
        cache.length, cache.padded = length, padded
