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
from adaskip_fx.model.load import Loaded, load, packaged_model, usable_backend
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
        new: tokens of an answer at most.
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
    """One request.

    Attributes:
        seconds: of a token after the first, by way.
        accounts: what it has cost, by way of drafting.
        told: whether it said that it fell back, likewise.
    """

    seconds: dict[str, float]
    accounts: dict[str, Account]
    told: dict[str, bool]


@dataclass(frozen=True)
class Ways:
    """The model as it is asked.

    Attributes:
        original: transformers' own.
        compiled: by name: `plain`, `unbounded`, and the bounded ways of `recorded`.
        recorded: what the bounded ways draft: `bounded` as it pays, `always` whether or not.
    """

    original: Any
    compiled: dict[str, Any]
    recorded: dict[str, Recorded]


def rows(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of request, and one for all; `name` is the model's."""
    small = load(name or str(packaged_model()), dtype="float32")
    sizes = _ON_GPU if small.model.device.type == "cuda" else _ELSEWHERE
    ways = _ways(small, sizes)
    for fast in ways.compiled.values():
        fast.adaskip.warmup(4 * sizes.context + sizes.new)
    ordinary = list[Answered]()
    for kind in (*tasks.TARGETS, *hostile.KINDS):
        made = tasks if kind in tasks.TARGETS else hostile
        count = sizes.requests if made is tasks else sizes.hostile
        prompts = made.prompts(kind, count, 4 * sizes.context)
        ids = [torch.tensor([prompt_ids(small.tokenizer, text)]) for text in prompts]
        answers = list(_answers(ways, ids, sizes.new))
        ordinary += answers if made is tasks else []
        yield _row(kind, answers, made is hostile)
    yield _row(f"all {len(ordinary)} requests of four kinds", ordinary, False)


def _ways(small: Loaded, sizes: Sizes) -> Ways:
    on_gpu = small.model.device.type == "cuda"
    backend, _ = usable_backend("inductor" if on_gpu else "eager", small.model.device)
    texts = calibration_samples(None, sizes.calibrated, 4)
    profile = adaskip_fx.calibrate(small.model, small.tokenizer, texts, sizes.calibrated)
    ranking = np.argsort(-profile.similarity("paper"), kind="stable")
    plan = AdaSkip().plan_of(profile, {profile.sublayers[i] for i in ranking[: sizes.skipped]})
    compiled = {
        "plain": build(small.model, None, backend=backend),
        "unbounded": build(small.model, plan, backend=backend),
    }
    recorded = {"bounded": Recorded(Skipped()), "always": Recorded(Skipped())}
    for way, proposer in recorded.items():
        decoding = Bounded((proposer,), adaptive=way == "bounded", max_divergence=MOST)
        options: dict[str, Any] = {"decoding": decoding, "profile": profile, "backend": backend}
        compiled[way] = build(small.model, plan, **options)
    return Ways(small.model, compiled, recorded)


def _answers(ways: Ways, prompts: Sequence[torch.Tensor], new: int) -> Iterator[Answered]:
    for number, prompt in enumerate(prompts):
        ids, took, answers = prompt.to(ways.original.device), dict[str, float](), {}
        for _ in range(2 if number == 0 else 1):  # the first one sets things up
            before = {name: ways.compiled[name].adaskip.drafts.fell_back for name in ways.recorded}
            for recorded in ways.recorded.values():
                recorded.taken(0)
            for name, fast in ways.compiled.items():
                took[name], answers[name] = tasks.answer(fast, ids, new)
        accounts = {name: _account(ways, name, answers[name], ids) for name in ways.recorded}
        after = {name: ways.compiled[name].adaskip.drafts.fell_back for name in ways.recorded}
        yield Answered(took, accounts, {name: after[name] > before[name] for name in before})


@torch.inference_mode()
def _account(ways: Ways, name: str, text: torch.Tensor, prompt: torch.Tensor) -> Account:
    answer, begin = text[0, prompt.shape[1] :], prompt.shape[1]
    full = ways.original(text, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return account(full, answer, ways.recorded[name].taken(begin), MOST)


def _row(kind: str, answers: Sequence[Answered], is_hostile: bool) -> dict[str, Any]:
    allowed = [a for a in answers if not a.told["bounded"]] or answers
    times = {n: sum(a.seconds[n] for a in allowed) for n in answers[0].seconds}
    return {
        "what": f"{kind} within {MOST:g} nats: speed of the plan that is kept",
        "ratio": times["unbounded"] / times["bounded"],
        "target": None if is_hostile or allowed is answers else KEPT,
        "notes": {
            **_told(answers, "bounded"),
            "timed": len(allowed),
            "unbounded_over_plain": times["plain"] / times["unbounded"],
            "drafting_always": {
                **_told(answers, "always"),
                "kept": times["unbounded"] / times["always"],
            },
        },
    }


def _told(answers: Sequence[Answered], way: str) -> dict[str, Any]:
    accounts = [a.accounts[way] for a in answers]
    return {
        "within": f"{sum(a.mean <= MOST + TOLERANCE for a in accounts)} of {len(accounts)}",
        "worst_mean": max(a.mean for a in accounts),
        "median_mean": statistics.median(a.mean for a in accounts),
        "all_drafts_median": statistics.median(a.drafted for a in accounts),
        "fell_back": f"{sum(a.fell_back for a in accounts)} of {len(accounts)}",
        "said_so": f"{sum(a.told[way] for a in answers)} of {len(answers)}",
    }
