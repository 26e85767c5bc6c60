"""Decoding with drafts: propose a few tokens, verify them in one program, keep what is accepted.

A round begins with a text of which all but the last token is stored. A proposer drafts k tokens;
the full program reads the last token and the drafts, which gives k + 1 tokens' logits; of the
drafts those stand that all rows accept, and what was stored beyond them is forgotten by position.
The token after them is chosen by the full program's logits, as `generation` does it. A round that
has nothing to verify is a plain step. (What becomes of a block is in `best_blocks` and `blocks`.)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import PlanError, SkipPlan
from ..speculation.chooser import Chooser
from ..speculation.proposals import Drafts
from ..speculation.refinement import Refine, Refinement
from ..speculation.speculation import Speculation
from ..utils.generation_internals import next_kwargs
from ..utils.transformers_types import DecodingCall, MakeCandidates, ModelKwargs, Output
from .assistant import Assistant
from .best_blocks import BestBlockRequest
from .draftable import leave_out_positions, look_up_blocks, positions
from .matchness import has, matchness

if TYPE_CHECKING:
    from .types import CompiledCausalLM

logger = logging.getLogger(__name__)


class DraftedRequest(BestBlockRequest):
    """A request whose tokens are drafted; also what proposers see of it (`Context`).

    Attributes:
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
        self.plan, self._longest = speculation.plan, speculation.decoding.longest
        self.samples = call.config.do_sample
        more = [] if assistant is None else [Assistant(assistant, self, call.config)]
        self._chooser = Chooser(speculation, call.input_ids.shape[0], more)
        self._speculation = speculation
        self._searches = dict[int, Refinement | None]()  # None: it is over
        self._work = (-1, -1, -1, -1)
        self._positions = positions(model)
        self._verifies = True  # the next block
        self._before = speculation.stats.verifications, speculation.stats.steps
        super().__init__(model, call, speculation)
        leave_out_positions(model, self.model_kwargs)

    def prepare(self) -> None:
        """Look up what verifications need; see `DecodedRequest`."""
        look_up_blocks(self._model, self.cache)

    # What proposers see ----------------------------------------------------------------------

    def due(self, plan: SkipPlan, weaker: Sequence[SkipPlan] | None) -> SkipPlan:
        """Return the plan to draft with; see `Context`."""
        return plan if self.budget is None else self.budget.due(plan, weaker)

    def refined(self, plan: SkipPlan, refine: Refine) -> SkipPlan:
        """Return what a plan has been refined to; see `Context`."""
        found = self._speculation.refinement(refine, plan)
        self._searches.setdefault(id(found), found)
        return found.plan(self.cache.length)

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
                logits = self.read(text, kwargs, 1)[:, -1].to(torch.float32)
                scores = self.process(text, logits) if self.processed else logits
                tokens.append(self.rule.choose(scores)[0])
                given.append(logits)
                if self.samples:
                    chances.append(torch.softmax(scores, -1))
                text = torch.cat((text, tokens[-1].unsqueeze(1)), 1)
                kwargs = self.after(kwargs)
        except BaseException:
            cache.keep_first(stored)
            raise
        finally:
            cache.drafting.plan = None
        if self._verifies:
            cache.keep_first(stored)
        drawn = torch.stack(chances, 1) if chances else None
        found = Drafts(torch.stack(tokens, 1), drawn, kind=plan.digest[:8])
        return replace(found, logits=torch.stack(given, 1), plan=plan)

    # Rounds ----------------------------------------------------------------------------------

    @property
    def goes_ahead(self) -> bool:
        """Whether nothing is worth drafting, as far as the tokens are on the host by now."""
        if self._following is not None or self._tries_plans():
            return False
        return self._chooser.offer(self, self._most(), self.cache.length) is None

    def received(self) -> None:
        """Take the time of what was run since the last token."""
        super().received()
        runtime, before = self._model._adaskip, self._work
        counters, static = runtime.counters, runtime.runner.static
        self._work = counters.captures, counters.links, static.recorded, static.begun
        self._chooser.took(self.cache.length, undisturbed=self._work == before)

    def run_step(self) -> None:
        """Run one decode step, which has nothing to verify."""
        self.stats.steps += 1
        self.ready = {}  # a streamer is given this step's token before the next block
        super().run_step()
        self._meanwhile()

    def advance(self) -> bool:
        """Verify drafts, or run a plain step where there are none; see `DecodedRequest`."""
        self._try_other_plans()
        offer = self._chooser.offer(self, self._most(), self.cache.length)
        free = offer is None or offer.drafts is not None
        self._verifies = free or self.budget is None or self.budget.toss()
        drafts = None if offer is None else self._chooser.drafts(self, offer)
        if offer is None or drafts is None:
            return self.plain()
        accepted, ended = self.block(offer.name, drafts)
        if self._releases(drafts):
            self._chooser.released(offer, drafts.count, accepted)
            return ended
        kind = drafts.kind
        if self.budget is not None and drafts.plan is not None:
            kind = self.budget.verified(drafts.plan, accepted + 1).digest[:8]
        self._chooser.verified(offer, drafts, accepted, kind)
        return ended

    def plain(self) -> bool:
        """Run a round that has nothing to verify; see `advance`."""
        return super().advance()

    def block(self, name: str, drafts: Drafts) -> tuple[int, bool]:
        """Verify drafts by the proposer `name`, or write them as they are.

        Returns:
            How many stand (but the last of those that are not verified, which is chosen by its
            logits), and whether the request has ended with them.
        """
        if not self.by_best:
            drafts = drafts.on(self.unfinished.device)
        padded = self.with_padding(drafts)
        if drafts.logits is not None and self._releases(drafts):
            return self._release(padded, drafts.logits)
        accepted, ended = self._verify(padded)
        self.stats.count(name, drafts.count, accepted, len(self.rows), drafts.kind)
        return accepted, ended

    def _meanwhile(self) -> None:
        """Do what the next step need not wait for, while the device runs it."""
        self._text.hand_on()
        self._chooser.settle()

    def _releases(self, drafts: Drafts) -> bool:
        return not self._verifies and drafts.logits is not None

    def _try_other_plans(self) -> None:
        """Measure the next candidate of each search, as far as that is paid for."""
        for name, search in self._searches.items():
            if search is None or not self._tries_plans():
                continue
            plan = search.candidate()
            if plan is None:
                self._searches[name] = None
                continue
            stored, counters = self.cache.length, self._model._adaskip.counters
            since, captures = self._chooser.now(), counters.captures
            share = self.measure(plan)
            self._chooser.measured(stored, since, counters.captures == captures)
            search.measured(plan, share)
            logger.debug("plan %s would have drafted %.2f of the text", plan.digest[:8], share)

    def measure(self, plan: SkipPlan) -> float:
        """Return the matchness of a plan, on as many tokens as there is a graph for."""
        return matchness(self, plan, self._longest + 1)

    def _tries_plans(self) -> bool:
        """Return whether a candidate can be measured now, and is paid for."""
        wanted = any(search is not None for search in self._searches.values())
        possible = wanted and has(self, self._longest + 1)
        return possible and self._chooser.affords(self.cache.length)

    def _release(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Append drafts that are not verified, and leave the last to be chosen by its logits.

        Returns:
            How many were appended, and whether all rows have ended with them.
        """
        coin = self.budget.coin if self.budget is not None else None
        assert coin is not None, "without a coin every block is verified"
        stored, count = self.cache.length - drafts.count, drafts.count - 1
        first = drafts.columns(0, count)
        kept, left = 0, 1
        if count:
            scores = self.scores(first, logits, 0, count)
            kept, _, left = self.append_columns(first.tokens, scores, logits[:, :count])
        self.cache.keep_first(stored + 1 + kept - (not left))
        self.model_kwargs = self.after(self.model_kwargs, kept + 1)
        self.logits = logits[:, kept]
        coin.released(kept + (left > 0))
        return kept, not left

    def _most(self) -> int:
        """Return how many drafts there may be now: one more token follows those that stand."""
        most, last = self._positions - self.cache.length - 1, self.call.stopping_criteria.max_length
        most = most if last is None else min(most, last - self.written - 1)
        return min(most, self._longest)

    def _verify(self, drafts: Drafts) -> tuple[int, bool]:
        """Read drafts, and append those that stand.

        Returns:
            How many do, and whether the request has ended with them.
        """
        stored, count = self.cache.length, drafts.count
        logits = self._read(drafts)[:, -count - 1 :]
        logits = logits if self.by_best else logits.to(torch.float32)
        self._meanwhile()
        self.get_ready()
        accepted, ended = self.accept(drafts, logits)
        self.cache.keep_first(stored + 1 + accepted - ended)  # first: then its mask goes on
        self.model_kwargs = self.after(self.model_kwargs, accepted + 1)
        if not self.by_best:
            self.logits = logits[:, accepted]
        return accepted, ended

    def _read(self, drafts: Drafts) -> torch.Tensor:
        """Run the last token and drafts; return logits of at least these [B, k + 1, V]."""
        logits = self.read_at_once(drafts)
        if logits is not None:
            return logits
        text = torch.cat((self.input_ids, drafts.on(self.unfinished.device).tokens), 1)
        return self.read(text, self.after(self.model_kwargs, drafts.count), drafts.count + 1)

    def after(self, kwargs: ModelKwargs, tokens: int = 1) -> ModelKwargs:
        """Return the arguments of forward after so many tokens more."""
        return kwargs if self.goes_direct else next_kwargs(self._model, None, dict(kwargs), tokens)

    def result(self, cache: SkipCache) -> Any:
        """Return what ``generate`` returns, when what it took is counted and told."""
        if self.budget is not None:
            self.budget.end()
        self._chooser.settle()
        verifications, steps = self._before
        logger.info(
            "%d tokens in %d verifications and %d plain steps",
            self.written - self.call.input_ids.shape[1],
            self.stats.verifications - verifications,
            self.stats.steps - steps,
        )
        return super().result(cache)

    def read(self, text: torch.Tensor, kwargs: ModelKwargs, tokens: int) -> torch.Tensor:
        """Run the last `tokens` tokens of a text, and return logits of all of these [B, T, V]."""
        logits = self.directly(text[:, -tokens:])
        if logits is not None:
            return logits
        inputs = self._model.prepare_inputs_for_generation(
            text, next_sequence_length=tokens, **kwargs
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = tokens
        outputs: Output = self._model(**inputs, return_dict=True)
        return outputs.logits
