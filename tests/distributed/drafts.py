"""Checks of `worker` in which tokens are drafted, while clocks and proposers of ranks differ."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaskip_fx import Bounded, Lossless, SkipPlan
from adaskip_fx.api import build
from adaskip_fx.model import generation
from adaskip_fx.runtime.draft_with import draft_with
from adaskip_fx.speculation import divergence
from adaskip_fx.speculation.acceptance import Greedy
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.proposals import Context, Drafts
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from adaskip_fx.speculation.swift import Swift
from tests.distributed.failures import told, until_all_are_told
from tests.support.drafts import Oracle

_NEW = 20
_GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": _NEW}


def prompt(rows: int) -> torch.Tensor:
    """Tokens of which the first come again, so that there is something to look up."""
    ids = torch.randint(1, 98, (rows, 9), generator=torch.Generator().manual_seed(3))
    return torch.cat((ids, ids[:, :5]), 1)


@dataclass
class Raises:
    """A proposer that fails when it is asked for the second time."""

    name: str = "raises"
    free: bool = True
    asked: int = 0

    def begin(self) -> Raises:
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        self.asked += 1
        if self.asked == 2:
            raise KeyError("no such draft")
        return Drafts(context.input_ids[:, -1:].expand(-1, most).contiguous())


class Models:
    """The model on all ranks that drafts, and the same in one process."""

    def __init__(self, shared: Any) -> None:
        alone, spread = shared.llamas
        plan = SkipPlan.of(shared.fast.adaskip.sublayers, ["1.attention", "2.ffn"])
        decoding = Lossless((Lookup(),), longest=4)
        self.alone, self.plan = alone, plan
        self.fast = build(spread, plan, decoding=decoding, backend="eager")
        self.of_one = build(alone, plan, decoding=decoding, backend="eager")

    def begin(self, decoding: Lossless, clock: Callable[[], float] | None = None) -> Speculation:
        """Have the model on all ranks draft in this way from now on."""
        return _begin(self.fast, decoding, self.plan, clock)

    def begin_alone(
        self, decoding: Lossless, clock: Callable[[], float] | None = None
    ) -> Speculation:
        """Likewise of the model in one process."""
        return _begin(self.of_one, decoding, self.plan, clock)

    def greedy(self, ids: torch.Tensor, **more: Any) -> Any:
        """What the eager model generates in one process, token by token."""
        return self.alone.generate(ids, **{**_GREEDY, **more}).tolist()


def _begin(model: Any, decoding: Lossless, plan: SkipPlan, clock: Any) -> Speculation:
    drafts = Speculation(decoding, plan, *([] if clock is None else [clock]))
    model._adaskip.speculation = drafts
    return drafts


@functools.cache
def models(shared: Any) -> Models:
    return Models(shared)


def clock_of(rank: int) -> Callable[[], float]:
    """Each look is a second later on rank 0; on others rounds take longer and longer."""
    times = itertools.count() if rank == 0 else (i**3 for i in itertools.count())
    return functools.partial(next, map(float, times))


def rounds(drafts: Speculation) -> Any:
    """What became of a request, and who drafted in it."""
    counted = asdict(drafts.stats)
    proposers = {name: one["drafted"] for name, one in counted["proposers"].items()}
    return [counted["verifications"], counted["steps"], proposers]


def drafted(shared: Any) -> Any:
    """All that is drafted on ranks whose clocks, seeds and proposers differ."""
    of = models(shared)
    checks = (
        by_clock,
        rounding,
        ragged,
        ahead,
        at_random,
        bounded,
        sampled_blocks,
        refined,
        failing,
        more,
    )
    return {check.__name__: check(of, shared.rank, shared) for check in checks}


def by_clock(of: Models, rank: int, _shared: Any) -> Any:
    """Rank 0's clock decides; each rank's own would have other rounds."""
    ids, expected = prompt(1), of.greedy(prompt(1))
    decoding = Lossless((Oracle(torch.tensor(expected), wrong=4), Skipped()), longest=4)
    drafts = of.begin(decoding, clock_of(rank))
    made = of.fast.generate(ids, **_GREEDY).tolist()
    own = of.begin_alone(decoding, clock_of(rank))
    of.of_one.generate(ids, **_GREEDY)
    return {
        "equal": made == expected,
        "rounds": rounds(drafts),
        "of its own clock": rounds(own),
    }


class Otherwise(Greedy):
    """Greedy search as on a rank whose logits have been rounded otherwise, and far."""

    def accepts(self, scores: torch.Tensor, drafts: Drafts, logits: torch.Tensor) -> torch.Tensor:
        return ~super().accepts(scores, drafts, logits)

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return scores.argmin(-1), None


def rounding(of: Models, rank: int, _shared: Any) -> Any:
    """The other rank would choose and accept other tokens."""
    of.begin(Lossless((Skipped(),), longest=3, adaptive=False))
    rule = generation.Greedy
    generation.Greedy = Otherwise if rank else rule  # type: ignore[misc]
    made = of.fast.generate(prompt(1), **_GREEDY).tolist()
    generation.Greedy = rule  # type: ignore[misc]
    return {"equal": made == of.greedy(prompt(1)), "stats": str(of.fast.adaskip.drafts)}


def ragged(of: Models, rank: int, _shared: Any) -> Any:
    """Rows that accept other drafts, padding before and after them; rank 1's drafts are wrong."""
    ids, mask = prompt(3), torch.ones(3, 14, dtype=torch.int64)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "eos_token_id": [5, 17, 33], "repetition_penalty": 1.2}
    expected = of.greedy(ids, **options)
    text = torch.tensor(expected)
    text[1, 18::3] += 1  # of one row alone
    drafts = of.begin(Lossless((Oracle(text, wrong=rank),), longest=4, adaptive=False))
    made = of.fast.generate(ids, **{**_GREEDY, **options}).tolist()
    return {"equal": made == expected, "rounds": rounds(drafts), "stats": str(drafts.stats)}


def ahead(of: Models, rank: int, _shared: Any) -> Any:
    """Steps that are begun before the host has the last token, and drafts between them."""
    ids, expected = prompt(1), of.greedy(prompt(1))
    oracle = Oracle(torch.tensor(expected), wrong=2 - rank)
    drafts = of.begin(Lossless((oracle,), longest=4), clock_of(rank))
    of.fast._adaskip.ahead = True
    made = of.fast.generate(ids, **_GREEDY).tolist()
    stopped = made[0][20]
    early = of.fast.generate(ids, **_GREEDY, eos_token_id=stopped).tolist()
    of.fast._adaskip.ahead = False
    seconds = (1e6, 0.0)[rank]  # which is over at once on the other rank
    timed = of.fast.generate(ids, **_GREEDY, max_time=seconds).tolist()
    return {
        "equal": made == expected,
        "timed": timed == expected,
        "stopped": early == of.greedy(ids, eos_token_id=stopped),
        "rounds": rounds(drafts),
    }


def at_random(of: Models, rank: int, _shared: Any) -> Any:
    """Tokens that are drawn by ranks of other seeds, and by one process with the first one's."""
    decoding = Lossless((Skipped(),), longest=3, adaptive=False)
    options = {**_GREEDY, "do_sample": True, "top_k": 20}
    of.begin(decoding)
    torch.manual_seed(7 + rank)
    drawn = of.fast.generate(prompt(1), **options).tolist()
    after = torch.rand(1).item()
    of.begin_alone(decoding)
    torch.manual_seed(7)
    alone = of.of_one.generate(prompt(1), **options).tolist()
    return {"drawn": drawn, "alone": alone, "after": after}


def bounded(of: Models, rank: int, _shared: Any) -> Any:
    """Tokens within a bound, and what they have diverged; the same in one process.

    The other rank would find that they diverge three times as much.
    """
    ids, found, right = prompt(1), dict[str, Any](), divergence.divergence
    for begin, model, name in ((of.begin, of.fast, "ranks"), (of.begin_alone, of.of_one, "alone")):
        drafts = begin(Bounded((Skipped(),), longest=3, adaptive=False, max_divergence=0.5))
        if rank and name == "ranks":
            divergence.divergence = lambda full, draft: right(full, draft) * 3
        made = model.generate(ids, **_GREEDY).tolist()
        divergence.divergence = right
        stats = drafts.stats
        found[name] = {
            "tokens": made,
            "worst": stats.worst,
            "mean": stats.divergence,
            "rounds": rounds(drafts),
        }
    return {**found, "greedy": of.greedy(ids)}


def sampled_blocks(of: Models, rank: int, _shared: Any) -> Any:
    """Blocks of which a coin, which ranks toss for themselves, has some verified."""
    plan = SkipPlan.of(of.plan.sublayers, ["2.ffn"])
    drafts = of.begin(Bounded((Skipped(plan),), 3, False, max_divergence=1.0, verify_share=0.5))
    torch.manual_seed(rank)
    made = of.fast.generate(prompt(1), **_GREEDY).tolist()
    stats = drafts.stats
    return [made, stats.unverified, stats.estimate, stats.upper, stats.verifications]


def refined(of: Models, _rank: int, _shared: Any) -> Any:
    """Other plans are tried on the text."""
    drafts = of.begin(Lossless((Skipped(refine=Swift()),), longest=2, adaptive=False))
    made = of.fast.generate(prompt(1), **_GREEDY).tolist()
    plans = sorted(drafts.stats.proposers["skipped"].kinds)
    return {"equal": made == of.greedy(prompt(1)), "plans": plans, "told": len(drafts.told)}


def failing(of: Models, rank: int, _shared: Any) -> Any:
    """A proposer fails on the first rank; one of the other is not asked."""
    found = {}
    for name, which in (("first", 0), ("other", 1)):
        proposer = Raises() if rank == which else Oracle(prompt(1))
        proposer.name = "raises"
        of.begin(Lossless((proposer,), longest=2, adaptive=False))
        found[name] = told(lambda: of.fast.generate(prompt(1), **_GREEDY))["text"]
    of.begin(Lossless((Lookup(),), longest=2, adaptive=False))
    made = of.fast.generate(prompt(1), **_GREEDY).tolist()
    return {**found, "goes on": made == of.greedy(prompt(1))}


def more(of: Models, rank: int, shared: Any) -> Any:
    """Options that differ by rank; models that draft for one another."""
    spread, runtime = shared.llamas[1], of.fast._adaskip
    torch.manual_seed(1)
    config = LlamaConfig(**{**of.alone.config.to_dict(), "num_hidden_layers": 1})
    small = LlamaForCausalLM(config).eval()
    lossless = Lossless((Lookup(),), longest=2 + rank)
    drafts = of.begin(Lossless((Lookup(),), longest=3, adaptive=False))
    ids, expected = prompt(1), of.greedy(prompt(1))
    other = told(lambda: draft_with(runtime, lossless))
    by_spread = told(lambda: of.fast.generate(ids, **_GREEDY, assistant_model=spread))
    of_small = of.fast.generate(ids, **_GREEDY, assistant_model=small).tolist()
    for_other = spread.generate(ids, **_GREEDY, assistant_model=shared.fast).tolist()
    return {
        "options": other["text"],
        "assistant on ranks": by_spread["text"],
        "small assistant": of_small == expected,
        "proposers": sorted(drafts.stats.proposers),
        "as assistant": for_other == expected,
    }


class Ends:
    """A streamer with which a process ends in the middle of a request, or fails."""

    def __init__(self, rank: int, of_rank: int, fails: bool = False) -> None:
        self._left = prompt(1).numel() + (8 if rank == of_rank else _NEW + 1)
        self._fails = fails

    def put(self, value: torch.Tensor) -> None:
        self._left -= value.numel()
        if not self._left and self._fails:
            raise ValueError("the reader is gone")
        if not self._left:
            os._exit(7)

    def end(self) -> None:
        """Nothing is to be done."""


def killed(shared: Any, rank: int = 1) -> Any:
    """A rank ends in mid-request; the others are told, and again by whatever they try next."""
    of, cache, ids = models(shared), shared.fast.adaskip.new_cache(), prompt(1)
    shared.fast(ids, past_key_values=cache)
    of.begin(Lossless((Skipped(),), longest=3, adaptive=False))
    of.fast.generate(ids, **_GREEDY)  # what is captured takes its time
    streamer = Ends(shared.rank, rank)
    return {
        "drafted": told(lambda: of.fast.generate(ids, **_GREEDY, streamer=streamer)),
        "step": told(lambda: shared.fast(ids[:, :1], past_key_values=cache)),
        "next": told(lambda: shared.fast(ids)),
    }


def killed_first(shared: Any) -> Any:
    """Likewise of the rank that the others follow."""
    return killed(shared, rank=0)


def reader_gone(shared: Any) -> Any:
    """A streamer fails on one rank alone, in mid-request; the other waits for an order."""
    of, ids = models(shared), prompt(1)
    of.begin(Lossless((Skipped(),), longest=3, adaptive=False))
    of.fast.generate(ids, **_GREEDY)  # what is captured takes its time
    streamer = Ends(shared.rank, 0, fails=True)
    found = told(lambda: of.fast.generate(ids, **_GREEDY, streamer=streamer))
    until_all_are_told(shared)
    return found


_HERE = (drafted, killed, killed_first, reader_gone)
CHECKS: dict[str, Callable[[Any], Any]] = {check.__name__: check for check in _HERE}
