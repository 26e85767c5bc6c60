"""Texts packed into one row without padding, told apart by positions that begin again.

transformers takes them so where there is neither a mask nor a cache (as a collator that flattens
makes them). They run as a prompt of as many rows, whose padding on the left is not computed.
Whether a model tells them apart is seen once: its own code is run on two, together and one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..capture.arguments import forward_names
from ..capture.check_graph import relative_error
from ..capture.state import State

if TYPE_CHECKING:
    from .types import CompiledCausalLM

_apart: WeakKeyDictionary[State, bool] = WeakKeyDictionary()


class PackedTexts(NamedTuple):
    """Where each token [B, N] is in a batch of the K texts [K, L] that are packed.

    Attributes:
        rows, columns: of each token, int64 [B, N].
        mask: of the batch, padded on the left, int64 [K, L].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, positions: torch.Tensor) -> PackedTexts | None:
        """Return it for positions [B, N]; None where each row is one text."""
        begins = positions.diff(dim=-1, prepend=positions[:, :1]) != 1
        begins[:, 0] = True
        if int(begins.sum()) == positions.shape[0]:
            return None
        rows = begins.flatten().cumsum(0) - 1
        lengths = rows.bincount()
        longest = int(lengths.max())
        order = torch.arange(rows.shape[0], device=rows.device)
        columns = order - lengths.cumsum(0)[rows] + longest
        mask = torch.zeros(lengths.shape[0], longest, dtype=torch.int64, device=rows.device)
        mask[rows, columns] = 1
        return cls(rows.view_as(positions), columns.view_as(positions), mask)

    def batch(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of tokens [B, N, ...] in the batch, [K, L, ...]; zeros at padding."""
        made = values.new_zeros((*self.mask.shape, *values.shape[2:]))
        made[self.rows, self.columns] = values
        return made

    def row(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the batch [K, L, ...] as those of the tokens, [B, N, ...]."""
        return values[self.rows, self.columns]


def packed_texts(
    model: CompiledCausalLM, positions: object, shape: torch.Size
) -> PackedTexts | None:
    """Return the texts that positions tell apart, where the model does so as well; else None.

    Args:
        model: a compiled model.
        positions: of a call without a mask and without a cache, [B or 1, N]; None where there are
            none.
        shape: of the tokens, (B, N).

    Raises:
        NotImplementedError: the model does neither that, nor takes all for one text.
    """
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return None
    if positions.shape[1] != shape[1] or positions.shape[0] not in (1, shape[0]):
        return None  # (refused by name later)
    texts = PackedTexts.of(positions.expand(shape))
    return texts if texts is not None and _tells_apart(model) else None


@torch.no_grad()
def _tells_apart(model: CompiledCausalLM) -> bool:
    graphs = model._adaskip.graphs
    state = graphs.states.look()
    if state not in _apart:
        original = graphs.states.original
        ids = state.reference.steps["prefill"][0].ids[:1]
        half = torch.arange(ids.shape[1] // 2, device=ids.device)
        rest = torch.arange(ids.shape[1] - len(half), device=ids.device)
        positions = torch.cat((half, rest)).unsqueeze(0)
        given = {"use_cache": False, "return_dict": True}
        named = {k: v for k, v in given.items() if k in forward_names(graphs.forward)}

        def logits(ids: torch.Tensor, positions: torch.Tensor, **more: Any) -> torch.Tensor:
            output = original(input_ids=ids, position_ids=positions, **named, **more)
            found: torch.Tensor = output.logits
            return found

        together = logits(ids, positions)
        cut = len(half)
        apart = [logits(i, p) for i, p in zip(_cut(ids, cut), _cut(positions, cut), strict=True)]
        joined = logits(ids, positions, attention_mask=torch.ones_like(ids))
        allowed = state.reference.tolerance
        if relative_error(together, torch.cat(apart, 1)) <= allowed:
            _apart[state] = True
        elif relative_error(together, joined) <= allowed:
            _apart[state] = False
        else:
            raise NotImplementedError(
                f"position_ids begin again within a row, and {type(original).__name__} tells texts "
                "that are packed apart in some of its layers alone, which is not supported by "
                "adaskip_fx yet; pad them, or call the original model"
            )
    return _apart[state]


def _cut(values: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    return values[:, :first], values[:, first:]
