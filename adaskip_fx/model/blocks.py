"""Blocks of drafts in a request: which of them stand, and how they are appended.

A block is accepted as far as every row accepts it, so that rows stay of one length: processors,
criteria and streamers see each column once, in order, as they do without drafts. It ends where a
row ends. Processors and criteria of transformers' are asked about a whole block at once where they
remember nothing; others column by column, about columns that are accepted alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..speculation.acceptance import Column, leading
from ..speculation.budget import Budget
from ..speculation.options import Bounded
from ..speculation.proposals import Drafts
from ..speculation.speculation import Speculation
from ..utils.stateless_rules import ends_by_token, remember_nothing
from ..utils.transformers_types import DecodingCall
from .generation import DecodedRequest
from .host_text import HostText

if TYPE_CHECKING:
    from .types import CompiledCausalLM


class BlockRequest(DecodedRequest):
    """A request to which several tokens of each row are appended at once.

    Attributes:
        rows: the tokens so far on the host, by row.
        stats: what is counted.
        processed: whether its logits processors may be asked about tokens that do not stand.
        budget: what it may diverge; None where drafts stand by the full program alone.
    """

    def __init__(
        self, model: CompiledCausalLM, call: DecodingCall, speculation: Speculation
    ) -> None:
        """Read the prompt; arguments as of `DraftedRequest`."""
        self._text = HostText(call.input_ids.tolist(), call.streamer)
        self.rows: Sequence[Sequence[int]] = self._text.rows
        self.stats = speculation.stats
        self._refused: Column | None = None
        self.processed = remember_nothing(call.logits_processor)
        self._at_once = self.processed and remember_nothing(call.stopping_criteria)
        self.budget: Budget | None = None
        self.stats.requests += 1
        super().__init__(model, replace(call, streamer=self._text))
        decoding = speculation.decoding
        if isinstance(decoding, Bounded) and self.processed:  # (else nothing stands by the bound)
            self.budget = Budget(self.rule, decoding, speculation, call.input_ids)
            self.rule = self.budget.within

    def choose_tokens(self) -> None:
        """Choose a token of each row, in place of the first draft that was not accepted if any."""
        refused, self._refused = self._refused, None
        if refused is None:
            super().choose_tokens()
            return
        tokens, invalid = self.rule.replace(refused)
        tokens = self.append(tokens, refused.scores, self.logits)
        self.host.send(tokens, self.unfinished.max() == 0, invalid)

    def append(
        self, tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Append a token of each row; see `DecodedRequest`."""
        self.stats.tokens += 1
        if self.budget is not None:
            self.budget.within.tokens = self.budget.within.tokens + self.counted(self.unfinished)
        return super().append(tokens, scores, logits)

    def accept(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Append the drafts that stand, and keep the first that does not.

        Returns:
            How many do, and whether all rows have ended with them.
        """
        accepted, fewer, left = 0, False, 1
        while accepted < drafts.count and not fewer:
            end = drafts.count if self._at_once else accepted + 1
            scores = self.scores(drafts, logits, accepted, end)
            part = drafts.columns(accepted, end)
            if self.budget is not None:
                self.budget.within.counted = self.counted(self.unfinished)
            stand = self.rule.accepts(scores, part, logits[:, accepted:end])
            if self.pads:
                stand = stand | (self.unfinished == 0).unsqueeze(1)
            taken = int(leading(stand))
            kept, fewer, left = self.append_columns(part.tokens, scores, logits, accepted, taken)
            accepted += kept
            if taken < part.count:
                if not fewer:
                    self._refused = Column.of(scores, part, stand, taken)
                break
        self.rule.settle(accepted + (self._refused is not None))
        return accepted, not left

    def append_columns(
        self,
        tokens: torch.Tensor,
        scores: torch.Tensor,
        logits: torch.Tensor,
        first: int,
        count: int,
    ) -> tuple[int, bool, int]:
        """Append the first `count` columns of tokens [B, C], up to one with which a row ends.

        Returns:
            How many were appended, whether a row has ended, and how many go on.
        """
        going, before = [self.unfinished], self.input_ids.shape[1]
        if ends_by_token(self.call.stopping_criteria, before + count):
            going += self._append_at_once(tokens[:, :count], scores, logits[:, first:])
        else:
            for column in range(count):
                super().append(tokens[:, column], scores[:, column], logits[:, first + column])
                going.append(self.unfinished)
        known = torch.cat((torch.stack(going).sum(1), tokens[:, :count].T.flatten())).tolist()
        left, columns = known[: count + 1], known[count + 1 :]  # of one look at the device
        kept = next((i for i in range(1, count + 1) if left[i] < left[0]), count)
        if self.budget is not None:
            released = kept * self.counted(going[0])
            self.budget.within.tokens = self.budget.within.tokens + released
        self.unfinished = going[kept]
        self.input_ids = self.input_ids[:, : before + kept]
        self.recorded.drop(count - kept)
        for column in torch.tensor(columns).view(count, -1)[:kept] if kept else ():
            self._text.put(column.clone())
        self.stats.tokens += kept
        return kept, left[kept] < left[0], left[kept]

    def _append_at_once(
        self, tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor
    ) -> list[torch.Tensor]:
        """Append columns of tokens [B, C], where the last token alone says whether a row has ended.

        Returns:
            Which rows go on after each column, int64 [B] each.
        """
        count = tokens.shape[1]
        for column in range(count if self.recorded.asked else 0):
            self.recorded.add(scores[:, column], logits[:, column])
        self.input_ids = torch.cat((self.input_ids, tokens), 1)
        ended = torch.zeros_like(tokens)
        for rule in self.call.stopping_criteria:
            ends = getattr(rule, "eos_token_id", None)
            if ends is not None:
                ended = ended | torch.isin(tokens, ends.to(tokens.device))
        before = self.unfinished.unsqueeze(1)
        return list((before & (ended.cumsum(1) == 0)).unbind(1))

    def counted(self, unfinished: torch.Tensor) -> torch.Tensor:
        """Return the rows whose tokens are no padding, int64 [B]."""
        return unfinished if self.pads else torch.ones_like(unfinished)

    def scores(self, drafts: Drafts, logits: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return the scores of columns of logits [B, k + 1, V], each given the drafts before it."""
        if not self.call.logits_processor:
            return logits[:, first:end]
        text, begun = self.input_ids, self.input_ids.shape[1] - first
        text = torch.cat((text, drafts.tokens[:, first:end]), 1)
        read = range(first, end)
        return torch.stack([self.process(text[:, : begun + i], logits[:, i]) for i in read], 1)

    def process(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores of logits [B, V], which stay as they are: some write on their own."""
        process: Callable[..., torch.Tensor] = self.call.logits_processor
        return process(text, logits.clone()) if self.call.logits_processor else logits
