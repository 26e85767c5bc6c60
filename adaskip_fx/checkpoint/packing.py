"""Which sublayers that run share a decoder layer of the new model.

A layer adds attention, then an FFN. Left out are layers of which nothing runs; and where the FFN of
one layer and the attention of the next are skipped, what is left of the two is one layer::

    0.attention  0.ffn     skipped      1.ffn  ->  0.attention  0.ffn
    skipped      1.ffn  ->  (stream order is kept, so this alone is possible)
    1.attention  skipped
    skipped      2.ffn  ->  1.attention  2.ffn
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from adaskip_passes import UnsupportedError

from ..plans.sublayer import Kind, Sublayer


@dataclass(frozen=True)
class PackedLayer:
    """A decoder layer of the new model.

    Attributes:
        attention: The layer whose attention it is; None where it adds nothing.
        ffn: Likewise of the FFN. Not both are None.
    """

    attention: int | None
    ffn: int | None

    def source(self, kind: Kind) -> int | None:
        """Return the layer that a branch is of; None where it adds nothing."""
        return self.attention if kind == "attention" else self.ffn

    def template(self, kind: Kind) -> int:
        """Return the layer that a branch's tensors are of, also where it adds nothing."""
        source = self.source(kind)
        other = self.ffn if kind == "attention" else self.attention
        found = source if source is not None else other
        assert found is not None, "nothing of a packed layer runs"
        return found


def pack(runs: list[Sublayer], may_share: bool) -> list[PackedLayer]:
    """Return the fewest layers that run `runs`, which are in stream order.

    Args:
        runs: The sublayers that run.
        may_share: Whether attention and FFN of different layers may become one layer. (Not where
            the two of a layer are in parallel: both read what the layer was given.)
    """
    packed: list[PackedLayer] = []
    for sublayer in runs:
        if sublayer.kind == "attention":
            packed.append(PackedLayer(sublayer.layer, None))
            continue
        last = packed[-1] if packed else None
        free = last is not None and last.ffn is None
        if last is not None and free and (may_share or last.attention == sublayer.layer):
            packed[-1] = PackedLayer(last.attention, sublayer.layer)
        else:
            packed.append(PackedLayer(None, sublayer.layer))
    return packed


def check_sublayers(sublayers: tuple[Sublayer, ...], layers: int) -> None:
    """Refuse a model whose layers are not attention and an FFN each.

    Raises:
        UnsupportedError: Names the first layer that is something else.
    """
    found = Counter((s.layer, s.kind) for s in sublayers)
    for layer in range(layers):
        kinds = [s.kind for s in sublayers if s.layer == layer]
        if kinds != ["attention", "ffn"] or found[layer, "ffn"] != 1:
            what = ", ".join(kinds) or "no sublayer"
            raise UnsupportedError(
                f"layer {layer} is {what}; only layers of attention and an FFN become a plain "
                "checkpoint: run the plan with adaskip_fx.compile"
            )
