"""What a rewritten decoder must compute, written without the passes: a loop over the modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.support.fx_decoders import Decoder


@dataclass(frozen=True)
class Instead:
    """What an eager model does in place of a sublayer: scale the stream, write to the cache."""

    factor: float | None = None
    writes: Literal["nothing", "counters", "everything"] = "nothing"


@torch.no_grad()
def eager(
    args: Mapping[str, Any],
    instead: Mapping[int, Instead] | None = None,
    streams: list[Tensor] | None = None,
) -> Tensor:
    """Logits of a decoder of pre-norm or post-norm blocks, some sublayers replaced.

    Args:
        args: arguments of `step`; the memory is written to.
        instead: replaced sublayers, by position along the stream.
        streams: receives copies of the stream before each sublayer and after the last.
    """
    model, ids, memory = args["model"], args["ids"], args["memory"]
    assert isinstance(model, Decoder)
    tokens, replaced = ids.shape[1], instead or {}
    start = memory.filled.shape[0] - tokens
    table = model.table(start, tokens)
    x = model.embed(ids)
    for number, (layer, slot) in enumerate(zip(model.layers, memory.slots, strict=True)):
        for index in (2 * number, 2 * number + 1):
            if streams is not None:
                streams.append(x.clone())
            attends = index % 2 == 0
            how = replaced.get(index)
            if how is None:
                branch = layer.attend(x, table, slot, start) if attends else layer.feed(x)
                x = layer.join(x, branch)
                continue
            if attends and how.writes == "everything":
                layer.attend(x, table, slot, start)
            elif attends and how.writes == "counters":
                slot.count.add_(tokens)
            if how.factor is not None:
                x = (x.to(torch.float32) * torch.tensor(how.factor)).to(x.dtype)
    if streams is not None:
        streams.append(x.clone())
    return model.head(model.norm(x))


def moments(before: Tensor, after: Tensor, valid: Tensor) -> npt.NDArray[np.float64]:
    """[batch, 5]: cosine, ratio, squared norms and count, summed over valid tokens in float64."""
    rows = []
    for a_row, b_row, counts in zip(before, after, valid, strict=True):
        total = np.zeros(5)
        for a32, b32, counted in zip(a_row, b_row, counts, strict=True):
            if not counted:
                continue
            a, b = (t.to(torch.float64).numpy() for t in (a32, b32))
            length_a, length_b = np.sqrt(a @ a), np.sqrt(b @ b)
            total += [a @ b / (length_a * length_b), length_b / length_a, a @ a, b @ b, 1.0]
        rows.append(total)
    return np.stack(rows)


def same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """True when two steps left equal bits in their memories."""
    pairs = zip(left["memory"].tensors(), right["memory"].tensors(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
