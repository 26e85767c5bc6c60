"""A prompt of padded rows, without the padding: its tokens one after the other in one row.

What is padding is not computed at all, and one captured graph serves any number of rows. Each row
attends to itself; its keys and values go where they would be with the padding, which steps after
the prompt leave out by the rows' bounds.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from adaskip_passes import UnsupportedError

from ..capture.arguments import bind_arguments, is_embedded, step_inputs
from ..capture.batch_sizes import BatchSizes
from ..capture.graph_key import GraphKey, Surroundings
from ..capture.state import ChangedError
from ..kv_cache.cache import SkipCache
from ..kv_cache.packed_view import PackedCacheView
from ..kv_cache.padding import Padding
from ..plans.skip_plan import SkipPlan
from ..programs.program_cache import Graphs
from .inputs import Inputs
from .kept_logits import kept_logits
from .request import Request
from .static_runner import Ran

logger = logging.getLogger(__name__)


class Packing(NamedTuple):
    """Where the tokens of padded rows [B, T] are among those that are no padding.

    Attributes:
        rows, columns: of each of the N tokens, int64 [N].
        offsets: where each row begins among them, and N: int64 [B + 1].
    """

    rows: torch.Tensor
    columns: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, padding: Padding, tokens: int) -> Packing:
        """Return it for rows of `tokens` tokens, on the CPU."""
        counts = torch.tensor(padding.counts, device="cpu")
        lengths = tokens - counts
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(len(counts), device="cpu").repeat_interleave(lengths)
        columns = torch.arange(len(rows), device="cpu") - (offsets[:-1] - counts)[rows]
        return cls(rows, columns, offsets)

    def slots(self, cache: SkipCache) -> torch.Tensor:
        """Return where keys and values of each token go, int64 [N].

        Where they would be with the padding; or one after the other, if nobody reads them later.
        """
        if cache.for_one_call:
            return torch.arange(len(self.rows), device="cpu")
        return self.columns * (len(self.offsets) - 1) + self.rows

    def places(self, columns: torch.Tensor) -> torch.Tensor:
        """Return where all rows' tokens in some columns [K] are, int64 [B, K]; -1: padding."""
        lengths = self.offsets.diff().unsqueeze(1)
        in_row = columns - (int(self.columns.max()) + 1 - lengths)
        return torch.where(in_row >= 0, self.offsets[:-1].unsqueeze(1) + in_row, -1)


class PackedRunner:
    """Runs prompts of padded rows of one compiled model.

    Attributes:
        why_not: why the model could not be captured that way; None if it could, or was not tried.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.why_not: str | None = None
        self._graphs = graphs

    def run(
        self,
        request: Request,
        plan: SkipPlan,
        inputs: Inputs,
        cache: SkipCache,
        wanted: int | torch.Tensor,
    ) -> Ran | None:
        """Run a prompt on an empty cache as `Runner.run` does; None where it cannot be packed."""
        graphs, padding = self._graphs, inputs.padding
        batch, tokens = inputs.input_ids.shape[:2]
        mixes = any(s.mixes for s in cache.specs)
        if self.why_not is not None or padding is None or mixes or inputs.axes:
            return None
        if max(padding.counts) >= tokens or batch * tokens - sum(padding.counts) < 2:
            return None
        inputs.check_positions()
        packing, device = Packing.of(padding, tokens), graphs.device
        columns = _columns(wanted, tokens)
        places = packing.places(columns)
        real = places >= 0
        indices = places[real].to(device)
        at = torch.stack((packing.rows * tokens + packing.columns, packing.slots(cache))).to(device)
        ids = inputs.input_ids.flatten(0, 1).unsqueeze(0).index_select(1, at[0])
        _, positions = inputs._replace(attention_mask=None).normal(0)
        positions = positions.reshape(1, -1).index_select(1, at[0])
        alone = cache.for_one_call
        rows, room = (1, len(packing.rows)) if alone else (batch, tokens)
        buffers = cache.reserve(rows, room)
        offsets = packing.offsets.to(torch.int32)
        view = PackedCacheView.of(buffers, cache.specs, room, at[1], offsets)
        kept = kept_logits(graphs.forward, indices, ids)
        key = self._key(kept.last, is_embedded(ids), buffers.by_head)
        given = step_inputs(graphs.forward, ids, positions, None, kept.argument)
        arguments = bind_arguments(graphs.model, graphs.forward, view, given)
        try:
            program = graphs.program(key, plan, (), arguments, request.begun)
        except ChangedError:
            raise
        except UnsupportedError as error:
            self.why_not = str(error)
            logger.info("padded prompts run with a mask: %s", error)
            return None
        weights = request.weights_of(program, arguments, cache.length, graphs.states)
        if not alone:
            buffers.zero_first(max(padding.counts))
        logits, _ = program(arguments, weights, None)
        return program, _unpacked(kept.of(logits)[0], real), None

    def _key(self, last_logits: bool, embedded: bool, by_head: bool) -> GraphKey:
        graphs = self._graphs
        return GraphKey(
            "prefill",
            batch=BatchSizes.only(1),
            one_token=False,
            one_stored=False,
            masked=False,
            last_logits=last_logits,
            dtype=graphs.model.dtype,
            device=graphs.device,
            surroundings=Surroundings.now(graphs.device),
            embedded=embedded,
            packed=True,
            by_head=by_head,
        )


def _columns(wanted: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the columns whose logits are wanted, as `kept_logits` describes them."""
    if isinstance(wanted, int):
        return torch.arange(max(0, tokens - wanted) if wanted else 0, tokens, device="cpu")
    return wanted.cpu() % tokens


def _unpacked(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return logits [n, V] of the tokens that are no padding as [B, K, V], zeros at padding."""
    if bool(real.all()):
        return logits.view(*real.shape, logits.shape[-1])
    whole = logits.new_zeros((*real.shape, logits.shape[-1]))
    whole[real.to(logits.device)] = logits
    return whole
