"""SmolLM2-135M-Instruct within a bound of divergence, which is measured anew at every token.

`adaskip_fx.Bounded` promises that the mean of KL(full || draft) over a request's tokens stays
within the bound. Here requests of four kinds are answered, and hostile ones, and afterwards the
original model reads every answer; see `accounts`. Everything is float32.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import adaskip_fx
from adaskip_fx.api import build
from adaskip_fx.data.reference_text import calibration_samples, prompt_ids
from adaskip_fx.model.load import load, packaged_model, usable_backend
from adaskip_fx.policies import AdaSkip
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.proposals import Context, Drafter, Drafts
from adaskip_fx.speculation.skipped import Skipped

from . import hostile, tasks
from .accounts import TOLERANCE, Account, Block, account


@dataclass(frozen=True)
class Sizes:
    """How much is asked for.

    Attributes:
        context: tokens of a prompt, about.
        new: tokens of an answer.
        requests: of each of the four kinds.
        hostile: of each hostile kind.
        skipped: how many sublayers the plan leaves out.
        calibrated: tokens of each of four texts that the plan is calibrated on.
    """

    context: int
    new: int
    requests: int
    hostile: int
    skipped: int = 4
    calibrated: int = 1024


_ON_GPU = Sizes(context=512, new=64, requests=50, hostile=8)
_ELSEWHERE = Sizes(context=128, new=48, requests=2, hostile=2, calibrated=256)
MOST = 0.05  # nats a token
KEPT = 0.8  # of the speed of the plan without a bound, on requests that allow it


@dataclass
class Recorded:
    """A proposer that keeps what another one drafts, until it is taken."""

    proposer: Skipped
    blocks: list[tuple[int, Drafts]] = field(default_factory=list)
    name: str = "skipped"
    free: bool = False

    @property
    def plan(self) -> Any:
        """What is drafted with, for who looks whether it can be linked."""
        return self.proposer.plan

    def begin(self) -> Drafter:
        """Draft for another request."""
        self._drafter: Drafter = self.proposer.begin()
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return what the other one drafts."""
        drafts = self._drafter.propose(context, most)
        if drafts is not None:
            self.blocks.append((context.input_ids.shape[1], drafts))
        return drafts

    def taken(self, prompt: int) -> list[Block]:
        """Return the drafts since the last call, of a request with a prompt of that length."""
        blocks, self.blocks = self.blocks, []
        return [Block(p - prompt, d.tokens[0], _given(d)[0]) for p, d in blocks]


def _given(drafts: Drafts) -> torch.Tensor:
    assert drafts.logits is not None
    return drafts.logits


@dataclass(frozen=True)
class Answered:
    """One request: what it has cost, and seconds of its tokens after the first, by way."""

    account: Account
    seconds: dict[str, float]
    told: bool


def rows(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of request, and one for all; `name` is the model's."""
    small = load(name or str(packaged_model()), dtype="float32")
    on_gpu = small.model.device.type == "cuda"
    sizes = _ON_GPU if on_gpu else _ELSEWHERE
    backend, _ = usable_backend("inductor" if on_gpu else "eager", small.model.device)
    texts = calibration_samples(None, sizes.calibrated, 4)
    profile = adaskip_fx.calibrate(small.model, small.tokenizer, texts, sizes.calibrated)
    ranking = np.argsort(-profile.similarity("paper"), kind="stable")
    plan = AdaSkip().plan_of(profile, {profile.sublayers[i] for i in ranking[: sizes.skipped]})
    recorded = Recorded(Skipped())
    bounded = Bounded((recorded,), max_divergence=MOST)
    models = {
        "plain": build(small.model, None, backend=backend),
        "unbounded": build(small.model, plan, backend=backend),
        "bounded": build(small.model, plan, decoding=bounded, profile=profile, backend=backend),
    }
    for fast in models.values():
        fast.adaskip.warmup(4 * sizes.context + sizes.new)
    ordinary = list[Answered]()
    for kind in (*tasks.TARGETS, *hostile.KINDS):
        made = tasks if kind in tasks.TARGETS else hostile
        count = sizes.requests if made is tasks else sizes.hostile
        prompts = made.prompts(kind, count, 4 * sizes.context)
        ids = [torch.tensor([prompt_ids(small.tokenizer, text)]) for text in prompts]
        answers = list(_answers(small.model, models, ids, recorded, sizes.new))
        ordinary += answers if made is tasks else []
        yield _row(kind, answers, made is hostile)
    yield _row(f"all {len(ordinary)} requests of four kinds", ordinary, False)


def _answers(
    model: Any,
    models: dict[str, Any],
    prompts: Sequence[torch.Tensor],
    recorded: Recorded,
    new: int,
) -> Iterator[Answered]:
    stats = models["bounded"].adaskip.drafts
    for number, prompt in enumerate(prompts):
        ids, took = prompt.to(model.device), dict[str, float]()
        for _ in range(2 if number == 0 else 1):  # the first one sets things up
            recorded.taken(0)
            before = stats.fell_back
            for name, fast in models.items():
                took[name], text = tasks.answer(fast, ids, new)
        answer = text[0, ids.shape[1] :]
        with torch.inference_mode():
            full = model(text, logits_to_keep=len(answer) + 1).logits[0, :-1]
        ends = np.atleast_1d(model.generation_config.eos_token_id).tolist()  # (not before the end)
        counted = account(full, answer, recorded.taken(ids.shape[1]), MOST, ends)
        yield Answered(counted, took, stats.fell_back > before)


def _row(kind: str, answers: Sequence[Answered], is_hostile: bool) -> dict[str, Any]:
    means = [a.account.mean for a in answers]
    allowed = [a for a in answers if not a.told] or answers
    times = {n: sum(a.seconds[n] for a in allowed) for n in answers[0].seconds}
    return {
        "what": f"{kind} within {MOST:g} nats: speed of the plan that is kept",
        "ratio": times["unbounded"] / times["bounded"],
        "target": None if is_hostile or allowed is answers else KEPT,
        "notes": {
            "within": f"{sum(mean <= MOST + TOLERANCE for mean in means)} of {len(means)}",
            "worst_mean": max(means),
            "median_mean": statistics.median(means),
            "all_drafts_median": statistics.median(a.account.drafted for a in answers),
            "fell_back": f"{sum(a.account.fell_back for a in answers)} of {len(answers)}",
            "said_so": f"{sum(a.told for a in answers)} of {len(answers)}",
            "timed": len(allowed),
            "plain_over_bounded": times["plain"] / times["bounded"],
        },
    }
