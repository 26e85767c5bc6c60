"""Which sublayers share a layer: by hand, and against trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.checkpoint.packing import PackedLayer, check_sublayers, pack
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_passes import UnsupportedError
from tests.support.checkpoints import fewest_layers

ALL = tuple(Sublayer(i, kind) for i in range(5) for kind in ("attention", "ffn"))
RUNS = st.lists(st.booleans(), min_size=10, max_size=10).map(
    lambda kept: [s for s, is_kept in zip(ALL, kept, strict=True) if is_kept]
)


def parsed(*names: str) -> list[Sublayer]:
    return [Sublayer.parse(name) for name in names]


def test_by_hand() -> None:
    runs = parsed("0.attention", "1.ffn", "2.ffn", "4.attention", "4.ffn")
    assert pack(runs, may_share=True) == [
        PackedLayer(0, 1),
        PackedLayer(None, 2),
        PackedLayer(4, 4),
    ]
    assert pack(runs, may_share=False) == [
        PackedLayer(0, None),
        PackedLayer(None, 1),
        PackedLayer(None, 2),
        PackedLayer(4, 4),
    ]


def test_a_branch_that_adds_nothing_is_made_of_its_neighbour() -> None:
    assert PackedLayer(None, 3).template("attention") == 3
    assert PackedLayer(2, None).template("ffn") == 2
    assert PackedLayer(2, 3).template("ffn") == 3


@given(RUNS, st.booleans())
def test_all_that_runs_is_there_in_order_and_in_the_fewest_layers(
    runs: list[Sublayer], may_share: bool
) -> None:
    packed = pack(runs, may_share)
    kinds = ("attention", "ffn")
    sources = [(layer.source(kind), kind) for layer in packed for kind in kinds]
    assert [Sublayer(i, kind) for i, kind in sources if i is not None] == runs

    def fits(first: Sublayer, second: Sublayer) -> bool:
        in_order = (first.kind, second.kind) == kinds
        return in_order and (may_share or first.layer == second.layer)

    assert len(packed) == fewest_layers(runs, fits)


def test_layers_of_something_else_are_refused() -> None:
    check_sublayers(ALL, 5)
    with pytest.raises(UnsupportedError, match=r"layer 1 is mixer, ffn; only layers of attention"):
        check_sublayers((*ALL[:2], Sublayer(1, "mixer"), Sublayer(1, "ffn")), 2)
    with pytest.raises(UnsupportedError, match="layer 5 is no sublayer"):
        check_sublayers(ALL, 6)
