"""What is known of a class is kept, and the class is not."""

from __future__ import annotations

import gc
from weakref import ref

from adaskip_fx.utils.weak_cache import weakly_cached


def test_what_is_asked_again_is_not_made_again() -> None:
    asked = []

    @weakly_cached
    def name(of: type) -> str:
        asked.append(of)
        return of.__name__

    class Mine:
        pass

    assert [name(Mine), name(Mine), name(int)] == ["Mine", "Mine", "int"]
    assert asked == [Mine, int]
    held = ref(Mine)
    asked.clear()
    del Mine
    gc.collect()
    assert held() is None


def test_what_cannot_be_referred_to_weakly_is_asked_each_time() -> None:
    assert weakly_cached(len)((1, 2)) == 2
