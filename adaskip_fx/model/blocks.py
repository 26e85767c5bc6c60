"""Blocks of drafts in a request: which of them stand, and how they are appended.

A block is accepted as far as every row accepts it, so that rows stay of one length: processors,
criteria and streamers see each column once, in order, as they do without drafts. It ends where a
row ends. Processors and criteria of transformers' are asked about a whole block at once where they
remember nothing; others column by column, about columns that are accepted alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn.functional import pad

from ..speculation.acceptance import Column, leading
from ..speculation.budget import Budget
from ..speculation.of_first import OfFirst
from ..speculation.options import Bounded
from ..speculation.proposals import Drafts
from ..speculation.speculation import Speculation
from ..utils.stateless_rules import ends_by_token, remember_nothing
from ..utils.transformers_types import DecodingCall
from .generation import DecodedRequest
from .host_text import HostText

if TYPE_CHECKING:
    from .types import CompiledCausalLM

_Number = TypeVar("_Number", int, float)


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
        self._following: list[int] | None = None  # tokens that were chosen with the last block
        self.processed = remember_nothing(call.logits_processor)
        self._at_once = self.processed and remember_nothing(call.stopping_criteria)
        self.budget: Budget | None = None
        self.stats.requests += 1
        super().__init__(model, replace(call, streamer=self._text))
        self._unlisted = self.cache.length - self.written  # of a prompt of embeddings
        decoding, ranks = speculation.decoding, model._adaskip.ranks
        if isinstance(decoding, Bounded) and self.processed:  # (else nothing stands by the bound)
            self.budget = Budget(self.rule, decoding, speculation, call.input_ids, ranks)
            self.rule = self.budget.within
        if not ranks.alone:
            self.rule = OfFirst(self.rule, ranks)

    def choose_tokens(self) -> None:
        """Choose a token of each row, in place of the first draft that was not accepted if any.

        Where a block is appended at once, the token after its drafts was chosen with them.
        """
        if self._following is not None:
            return
        refused, self._refused = self._refused, None
        if refused is None:
            super().choose_tokens()
            return
        tokens, invalid = self.rule.replace(refused)
        tokens = self.append(tokens, refused.scores, self.logits)
        self.tell(tokens, invalid)

    def append(
        self, tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Append a token of each row; see `DecodedRequest`."""
        self.stats.tokens += 1
        if self.budget is not None:
            self.budget.within.tokens = self.budget.within.tokens + self.counted(self.unfinished)
        return super().append(tokens, scores, logits)

    def abandon(self) -> None:
        """Forget what was not verified, or not streamed; see `DecodedRequest`."""
        with contextlib.suppress(NotImplementedError):  # windows may have let go of what they saw
            self.cache.keep_first(self._unlisted + self._text.handed - 1)

    def received(self) -> None:
        """Stream the token that was chosen with the last block, if it was."""
        super().received()
        following, self._following = self._following, None
        if following is not None:
            self._text.extend([following])

    def accept(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Append the drafts that stand, and the token after them if it can be chosen with them.

        Args:
            drafts: k of each row.
            logits: of the full program, for drafts and the token after them, float32 [B, k + 1, V].

        Returns:
            How many stand, and whether all rows have ended with them.
        """
        if self.budget is not None:
            self.budget.within.counted = self.counted(self.unfinished)
            self.budget.verify(drafts, logits[:, :-1])
        return (self._accept_at_once if self._at_once else self._accept_by_column)(drafts, logits)

    def _accept_at_once(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Accept a block with one look at the device, for what it is and for what follows it."""
        count, before = drafts.count, self.input_ids.shape[1]
        scores = self.scores(drafts, logits, 0, count + 1)
        stand = self._stand(scores[:, :count], drafts, logits[:, :count])
        taken = leading(stand)
        tokens, invalid = self.rule.replace(Column.at(scores, drafts, stand, taken))
        following = self.padded(tokens.unsqueeze(1))
        places = torch.arange(count + 1, device=taken.device)
        columns = torch.where(places < taken, pad(drafts.tokens, (0, 1)), following)
        going = self._append_all(columns, scores, logits)
        left = going.sum(1)
        whole = (left[1:] == left[0]).to(torch.int64).cumprod(0).sum()  # with which no row ends
        ends = torch.minimum(whole, taken) + 1
        self.rule.settle(ends.clamp_max(count))
        if self.budget is not None:
            within = self.budget.within
            within.tokens = within.tokens + ends * within.counted
        no = torch.zeros_like(taken) if invalid is None else invalid.to(torch.int64)
        flags, alive, read = self._look(torch.stack((ends, taken, no)), left, columns)
        kept, stood, wrong = flags
        fewer = kept <= stood
        accepted = kept if fewer else stood
        self._keep(before, going[kept], kept, count + 1)
        self._text.extend(read[:accepted])
        if not fewer:
            self._following = read[kept - 1]
            self.host.know(stop=not alive[kept], invalid=bool(wrong))
        return accepted, fewer and not alive[kept]

    def _accept_by_column(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Accept drafts one after the other: who is asked about them is asked about no others."""
        accepted, fewer, left = 0, False, 1
        while accepted < drafts.count and not fewer and self._refused is None:
            end = accepted + 1
            scores = self.scores(drafts, logits, accepted, end)
            part = drafts.columns(accepted, end)
            if self.budget is not None:
                self.budget.within.counted = self.counted(self.unfinished)
            stand = self._stand(scores, part, logits[:, accepted:end])
            taken = leading(stand)
            if not taken:
                self._refused = Column.at(scores, part, stand, taken)
                break
            kept, fewer, left = self.append_columns(part.tokens, scores, logits[:, accepted:end])
            accepted += kept
        settled = accepted + (self._refused is not None)
        self.rule.settle(torch.tensor(settled, device=logits.device))
        if self.budget is not None:
            self.budget.know(self.budget.told().tolist())
        return accepted, not left

    def _stand(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        """Return which drafts may stand, bool [B, C]: of rows that have ended all."""
        stand = self.rule.accepts(scores, drafts, logits)
        return stand | (self.unfinished == 0).unsqueeze(1) if self.pads else stand

    def _look(
        self, flags: torch.Tensor, left: torch.Tensor, columns: torch.Tensor
    ) -> tuple[list[int], list[int], list[list[int]]]:
        """Return three int64 tensors as the host's own, the last one by column; it looks once."""
        known, rows = torch.cat((flags, left, columns.T.flatten())), len(columns)
        if self.budget is None:
            numbers = known.tolist()
        else:
            told = self.budget.told()
            values = torch.cat((known.to(torch.float64), told.flatten())).tolist()
            numbers, rest = [int(v) for v in values[: len(known)]], values[len(known) :]
            self.budget.know(_cut(rest, rows))
        first, second = len(flags), len(flags) + len(left)
        return numbers[:first], numbers[first:second], _cut(numbers[second:], rows)

    def append_columns(
        self, tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor
    ) -> tuple[int, bool, int]:
        """Append columns of tokens [B, C], up to one with which a row ends.

        Args:
            tokens: at least one column.
            scores: what they were chosen by, float32 [B, C, V].
            logits: what scores were made of, float32 [B, C, V].

        Returns:
            How many were appended, whether a row has ended, and how many go on.
        """
        before, count = self.input_ids.shape[1], tokens.shape[1]
        going = self._append_all(tokens, scores, logits)
        known = torch.cat((going.sum(1), tokens.T.flatten())).tolist()
        left, columns = known[: count + 1], known[count + 1 :]  # of one look at the device
        kept = next((i for i in range(1, count + 1) if left[i] < left[0]), count)
        if self.budget is not None:
            released = kept * self.counted(going[0])
            self.budget.within.tokens = self.budget.within.tokens + released
        self._keep(before, going[kept], kept, count)
        self._text.extend(_cut(columns, len(tokens))[:kept])
        return kept, left[kept] < left[0], left[kept]

    def _append_all(
        self, tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Append columns of tokens [B, C]; returns which rows go on after each, int64 [C + 1, B].

        The first of these is before all of them.
        """
        going, count = [self.unfinished], tokens.shape[1]
        longest = self.input_ids.shape[1] + count
        if self.ends is not None or ends_by_token(self.call.stopping_criteria, longest):
            going += self._append_at_once(tokens, scores, logits)
        else:
            for column in range(count):
                super().append(tokens[:, column], scores[:, column], logits[:, column])
                going.append(self.unfinished)
        return torch.stack(going)

    def _keep(self, before: int, unfinished: torch.Tensor, kept: int, count: int) -> None:
        """Forget what was appended after the first `kept` columns of `count`."""
        self.unfinished = unfinished
        self.input_ids = self.input_ids[:, : before + kept]
        self.recorded.drop(count - kept)
        self.stats.tokens += kept

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

    def scores(self, drafts: Drafts, logits: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return the scores of columns of logits [B, k + 1, V], each given the drafts before it."""
        if not self.call.logits_processor:
            return logits[:, first:end]
        text, begun = self.input_ids, self.input_ids.shape[1] - first
        text = torch.cat((text, drafts.tokens[:, first:end]), 1)
        read = range(first, end)
        return torch.stack([self.process(text[:, : begun + i], logits[:, i]) for i in read], 1)


def _cut(values: list[_Number], size: int) -> list[list[_Number]]:
    """Return lists of `size` values each."""
    return [values[i : i + size] for i in range(0, len(values), size)]
