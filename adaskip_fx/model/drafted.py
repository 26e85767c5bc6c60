"""Decoding with drafts: propose a few tokens, verify them in one program, keep what is accepted.

A round begins with a text of which all but the last token is stored. A proposer drafts k tokens;
the full program reads the last token and the drafts, which gives k + 1 tokens' logits; of the
drafts those stand that all rows accept, and what was stored beyond them is forgotten by position.
The token after them is chosen by the full program's logits, as `generation` does it. A round that
has nothing to verify is a plain step.

A block is accepted as far as every row accepts it, so that rows stay of one length: processors,
criteria and streamers see each column once, in order, as they do without drafts. It ends where a
row ends. Processors and criteria of transformers' are asked about a whole block at once where they
remember nothing; others column by column, about columns that are accepted alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import PlanError, SkipPlan
from ..speculation.acceptance import Column, leading
from ..speculation.budget import Budget
from ..speculation.chooser import Chooser
from ..speculation.options import Bounded
from ..speculation.proposals import Drafts
from ..speculation.speculation import Speculation
from ..utils.stateless_rules import remember_nothing
from ..utils.transformers_internals import next_kwargs
from ..utils.transformers_types import DecodingCall, MakeCandidates, Output
from .assistant import Assistant
from .draftable import positions
from .generation import DecodedRequest
from .host_text import HostText

if TYPE_CHECKING:
    from .types import CompiledCausalLM


class DraftedRequest(DecodedRequest):
    """A request whose tokens are drafted; also what proposers see of it (`Context`).

    Attributes:
        rows: the tokens so far on the host, by row.
        samples: whether tokens are drawn.
        plan: what drafts of the model itself leave out.
    """

    def __init__(
        self,
        model: CompiledCausalLM,
        call: DecodingCall,
        speculation: Speculation,
        assistant: MakeCandidates | None = None,
    ) -> None:
        """Read the prompt.

        Args:
            model: a compiled model.
            call: as of `DecodedRequest`.
            speculation: what the model drafts with.
            assistant: who drafts besides, in this request.
        """
        text = HostText(call.input_ids.tolist(), call.streamer)
        self.rows: Sequence[Sequence[int]] = text.rows
        self.plan = speculation.plan
        self._stats, self._longest = speculation.stats, speculation.decoding.longest
        self.samples = call.config.do_sample
        more = [] if assistant is None else [Assistant(assistant, self, call.config)]
        self._chooser = Chooser(speculation, call.input_ids.shape[0], more)
        self._work = (-1, -1, -1)
        self._refused: Column | None = None
        self._processed = remember_nothing(call.logits_processor)
        self._at_once = self._processed and remember_nothing(call.stopping_criteria)
        self._positions = positions(model)
        self._stats.requests += 1
        self._budget: Budget | None = None
        super().__init__(model, replace(call, streamer=text))
        decoding = speculation.decoding
        if isinstance(decoding, Bounded) and self._processed:  # (else nothing stands by the bound)
            bound = decoding.max_divergence, speculation, call.input_ids
            self._budget = Budget(self.rule, *bound)
            self.rule = self._budget.within
        self._text = text

    # What proposers see ----------------------------------------------------------------------

    def due(self, plan: SkipPlan, weaker: Sequence[SkipPlan] | None) -> SkipPlan:
        """Return the plan to draft with; see `Context`."""
        return plan if self._budget is None else self._budget.due(plan, weaker)

    def draft(self, plan: SkipPlan, most: int) -> Drafts | None:
        """Return `most` tokens decoded under `plan`; see `Context`."""
        cache = self.cache
        try:
            cache.request.check_stored(plan)
        except PlanError:  # of a request that begins with a plan of its own
            return None
        stored, text, kwargs = cache.length, self.input_ids, self.model_kwargs
        tokens, chances, given = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        assert cache.drafting is not None
        cache.drafting.plan = plan
        try:
            for _ in range(most):
                logits = self._read(text, kwargs, 1).logits[:, -1].to(torch.float32)
                scores = self._process(text, logits) if self._processed else logits
                tokens.append(self.rule.choose(scores)[0])
                given.append(logits)
                if self.samples:
                    chances.append(torch.softmax(scores, -1))
                text = torch.cat((text, tokens[-1].unsqueeze(1)), 1)
                kwargs = next_kwargs(self._model, None, dict(kwargs))
        finally:
            cache.drafting.plan = None
            cache.keep_first(stored)
        drawn = torch.stack(chances, 1) if chances else None
        found = Drafts(torch.stack(tokens, 1), drawn, kind=plan.digest[:8])
        return replace(found, logits=torch.stack(given, 1), plan=plan)

    # Rounds ----------------------------------------------------------------------------------

    @property
    def goes_ahead(self) -> bool:
        """Whether nothing is worth drafting, as far as the tokens are on the host by now."""
        return self._chooser.offer(self, self._most(), self.cache.length) is None

    def received(self) -> None:
        """Take the time of what was run since the last token."""
        runtime, before = self._model._adaskip, self._work
        counters, recorded = runtime.counters, runtime.runner.static.recorded
        self._work = counters.captures, counters.links, recorded
        self._chooser.took(self.cache.length, undisturbed=self._work == before)

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
        self._stats.tokens += 1
        if self._budget is not None:
            self._budget.within.tokens = self._budget.within.tokens + self._counted(self.unfinished)
        return super().append(tokens, scores, logits)

    def run_step(self) -> None:
        """Run one decode step, which has nothing to verify."""
        self._stats.steps += 1
        super().run_step()

    def advance(self) -> bool:
        """Verify drafts, or run a plain step where there are none; see `DecodedRequest`."""
        offer = self._chooser.offer(self, self._most(), self.cache.length)
        drafts = None if offer is None else self._chooser.drafts(self, offer)
        if offer is None or drafts is None:
            return super().advance()
        padded = replace(drafts, tokens=self.padded(drafts.tokens))
        accepted, ended = self._verify(padded)
        self._stats.count(offer.name, drafts.count, accepted, len(self.rows), drafts.kind)
        kind = drafts.kind
        if self._budget is not None and drafts.plan is not None:
            kind = self._budget.verified(drafts.plan, accepted + 1).digest[:8]
        self._chooser.verified(offer, drafts, accepted, kind)
        return ended

    def _most(self) -> int:
        """Return how many drafts there may be now."""
        most, last = self._positions - self.cache.length - 1, self.call.stopping_criteria.max_length
        if last is not None:  # one more token follows those that are accepted
            most = min(most, last - self.input_ids.shape[1] - 1)
        return min(most, self._longest)

    def _verify(self, drafts: Drafts) -> tuple[int, bool]:
        """Read drafts, and append those that stand.

        Returns:
            How many do, and whether the request has ended with them.
        """
        stored, count = self.cache.length, drafts.count
        text = torch.cat((self.input_ids, drafts.tokens), 1)
        grown = next_kwargs(self._model, None, dict(self.model_kwargs), count)
        outputs = self._read(text, grown, count + 1)
        logits = outputs.logits[:, -count - 1 :].to(torch.float32)
        try:
            accepted, ended = self._accept(drafts, logits)
        except BaseException:  # of a processor, a criterion or a streamer
            self.cache.keep_first(min(stored + count, len(self.rows[0]) - 1))
            raise
        self.cache.keep_first(stored + 1 + accepted - ended)  # first: then its mask goes on
        self.model_kwargs = next_kwargs(self._model, outputs, self.model_kwargs, accepted + 1)
        self.logits = logits[:, accepted]
        return accepted, ended

    def _accept(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Append the drafts that stand, and keep the first that does not.

        Returns:
            How many do, and whether all rows have ended with them.
        """
        accepted, fewer, left = 0, False, 1
        while accepted < drafts.count and not fewer:
            end = drafts.count if self._at_once else accepted + 1
            scores = self._scores(drafts, logits, accepted, end)
            part = drafts.columns(accepted, end)
            if self._budget is not None:
                self._budget.within.counted = self._counted(self.unfinished)
            stand = self.rule.accepts(scores, part, logits[:, accepted:end])
            if self.pads:
                stand = stand | (self.unfinished == 0).unsqueeze(1)
            taken = int(leading(stand))
            kept, fewer, left = self._append_columns(part.tokens, scores, logits, accepted, taken)
            accepted += kept
            if taken < part.count:
                if not fewer:
                    self._refused = Column.of(scores, part, stand, taken)
                break
        self.rule.settle(accepted + (self._refused is not None))
        return accepted, not left

    def _append_columns(
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
        for column in range(count):
            self.append(tokens[:, column], scores[:, column], logits[:, first + column])
            going.append(self.unfinished)
        known = torch.cat((torch.stack(going).sum(1), tokens[:, :count].T.flatten())).tolist()
        left, columns = known[: count + 1], known[count + 1 :]  # of one look at the device
        kept = next((i for i in range(1, count + 1) if left[i] < left[0]), count)
        if self._budget is not None:
            dropped = [*map(self._counted, going[kept:-1]), torch.zeros_like(going[0])]
            self._budget.within.tokens = self._budget.within.tokens - torch.stack(dropped).sum(0)
        self.unfinished = going[kept]
        self.input_ids = self.input_ids[:, : before + kept]
        self.recorded.drop(count - kept)
        for column in torch.tensor(columns).view(count, -1)[:kept] if kept else ():
            self._text.put(column.clone())
        self._stats.tokens -= count - kept
        return kept, left[kept] < left[0], left[kept]

    def _counted(self, unfinished: torch.Tensor) -> torch.Tensor:
        """Return the rows whose tokens are no padding, int64 [B]."""
        return unfinished if self.pads else torch.ones_like(unfinished)

    def _scores(self, drafts: Drafts, logits: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return the scores of columns of logits [B, k + 1, V], each given the drafts before it."""
        text, begun = self.input_ids, self.input_ids.shape[1] - first
        text = torch.cat((text, drafts.tokens[:, first:end]), 1)
        read = range(first, end)
        return torch.stack([self._process(text[:, : begun + i], logits[:, i]) for i in read], 1)

    def _process(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores of logits [B, V], which stay as they are: some write on their own."""
        process: Callable[..., torch.Tensor] = self.call.logits_processor
        return process(text, logits.clone()) if self.call.logits_processor else logits

    def result(self, cache: SkipCache) -> Any:
        """Return what ``generate`` returns, when its divergence is counted."""
        if self._budget is not None:
            self._budget.end()
        return super().result(cache)

    def _read(self, text: torch.Tensor, kwargs: dict[str, object], tokens: int) -> Output:
        """Run the last `tokens` tokens of a text, and return logits of all of these."""
        inputs = self._model.prepare_inputs_for_generation(
            text, next_sequence_length=tokens, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = tokens
        outputs: Output = self._model(**inputs, return_dict=True)
        return outputs
