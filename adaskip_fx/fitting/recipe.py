"""From texts to a plan that keeps the most: choose, fit, refine, and say what decoding may add."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adaskip_fx.calibration import tokenize
from adaskip_fx.compensation import Compensation
from adaskip_fx.plan import SkipPlan
from adaskip_fx.policies import AdaSkip, Greedy, PlanPolicy
from adaskip_fx.profile import Profile
from adaskip_fx.search import CalibrationLoss
from adaskip_fx.stand_in import StandInKind
from adaskip_fx.sublayer import Sublayer

from .compensator import Compensator
from .fitter import Fitter, Rung
from .own_text import write_texts
from .refine import Refinement, refine
from .retrieval import retrieval_samples
from .sample import Sample

Kinds = Mapping[str, Sequence[str]]
Tokens = dict[str, list[torch.Tensor]]
Say = Callable[[str], None]
_FIT = 6  # texts of each kind that a search fits on
_JUDGE = 3  # held-out texts of each kind that candidates are judged on
_ASKED = 8  # answers that they are judged on
_WORSE = math.log(1.04)  # nats a token that all decode extras together may cost


@dataclass(frozen=True)
class Recipe:
    """How a plan is made.

    search: choose sublayers one by one by what is lost (`Greedy`, on texts and on answers to
        prompts that hide something); without, by the policy that is given.
    rung: what stands in for them.
    own: texts that the model writes itself, of `tokens` tokens, besides those that are given.
    tokens: of a text at most.
    steps: of refinement; 0 for none.
    shortlist: sublayers that a search tries at each step, the most similar; None for all.
    extras: whether ffn sublayers get stand-ins that decoding may add.
    seed: of all that is drawn.
    """

    search: bool = True
    rung: Rung = field(default_factory=lambda: Rung("normalized"))
    own: int = 64
    tokens: int = 2048
    steps: int = 300
    shortlist: int | None = 32
    extras: bool = True
    seed: int = 0

    @property
    def kind(self) -> StandInKind:
        """Of the stand-ins."""
        return self.rung.kind


def fit(
    model: Any,
    tokenizer: Any,
    texts: Kinds,
    profile: Profile,
    alpha: float,
    recipe: Recipe | None = None,
    *,
    policy: PlanPolicy | None = None,
    backend: str = "eager",
    say: Say = lambda _: None,
) -> SkipPlan:
    """A plan that skips as many sublayers as `alpha` says, with fitted stand-ins.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: by kind (prose, code, ...), each what the model will be used on, or close to it;
            of each kind every fifth, and at least one of two, is held out to judge by.
        profile: of the model.
        alpha: acceleration ratio, as of `skip_count`.
        recipe: see `Recipe`.
        policy: chooses sublayers where the recipe does not search; AdaSkip if None.
        backend: inner torch.compile backend; ``"eager"`` needs no compilation.
        say: told what is being done.

    Raises:
        ValueError: no texts, or too few; an alpha that cannot be met.
        RefusedError: the model cannot be captured, or gradients cannot flow through its graph.
    """
    recipe = recipe or Recipe()
    kitchen = _Kitchen(model, tokenizer, texts, recipe, backend, say)
    if recipe.search:
        plan = kitchen.searched(profile, alpha)
    else:
        plan = (policy or AdaSkip()).plan(profile, alpha)
    if not plan.prefill:
        return plan
    plan = SkipPlan(plan.sublayers, plan.prefill, plan.decode, last_token_full=plan.last_token_full)
    say(f"fit {len(plan.prefill)} stand-ins on {kitchen.fitter.tokens:,} tokens")
    plan = kitchen.fitter.fit(plan, recipe.rung)
    if recipe.steps:
        plan = kitchen.refined(plan)
    return kitchen.with_extras(plan) if recipe.extras else plan


class _Kitchen:
    """What the steps of a recipe share: one compiled model, texts to learn from and to judge by."""

    def __init__(
        self, model: Any, tokenizer: Any, texts: Kinds, recipe: Recipe, backend: str, say: Say
    ) -> None:
        self.recipe, self.tokenizer, self.say = recipe, tokenizer, say
        given = {
            kind: [t.to(model.device) for t in tokenize(model, tokenizer, some, recipe.tokens)]
            for kind, some in texts.items()
        }
        if not given or any(len(some) < 2 for some in given.values()):
            raise ValueError("give at least two texts of each kind: one is held out to judge by")
        first = {kind: some[:1] for kind, some in given.items()}
        self.fitter = Fitter(model, tokenizer, first, max_length=recipe.tokens, backend=backend)
        if recipe.own:
            say(f"write {recipe.own} texts of {recipe.tokens:,} tokens")
            given["own"] = write_texts(
                self.fitter.runtime, tokenizer, recipe.own, recipe.tokens, seed=recipe.seed
            )
        self.learned, self.held_out = _parted(given)
        self.fitter = self._fitter(None)
        pairs = self._asked(self.held_out, _ASKED, recipe.seed + 1)
        self.loss = CalibrationLoss(
            self.fitter.runtime.model,
            [t for some in self.held_out.values() for t in some[:_JUDGE]],
            [(s.ids[:, :at], s.ids[:, at:]) for s, at in map(_split, pairs)],
            answer_weight=0.3,
        )

    def searched(self, profile: Profile, alpha: float) -> SkipPlan:
        """The plan of a greedy search."""
        self.say("search")
        compensate = Compensator(self._fitter(_FIT), self.recipe.rung)
        never = self.fitter.runtime.graphs.unskippable
        greedy = Greedy(
            self.loss, compensate, never=frozenset(never), shortlist=self.recipe.shortlist
        )
        return greedy.plan(profile, alpha)

    def refined(self, plan: SkipPlan) -> SkipPlan:
        """Stand-ins refined on texts of all kinds and on prompts that hide something."""
        recipe = self.recipe
        groups = [[Sample(ids) for ids in some] for some in self.learned.values()]
        asked = max(8, len(self.fitter.samples) // 3)
        groups.append(self._asked(self.learned, asked, recipe.seed + 2))
        held = [Sample(t) for some in self.held_out.values() for t in some[:_JUDGE]]
        held += self._asked(self.held_out, 2, recipe.seed + 3)
        how = Refinement(steps=recipe.steps, batch=len(groups), seed=recipe.seed)
        plan, seen = refine(self.fitter, plan, groups, held, how)
        best = min(seen.losses.values())
        self.say(
            f"refined: KL of held-out texts from {seen.losses[0]:.4f} to {best:.4f} nats a token, "
            f"at step {seen.step} of {recipe.steps}"
        )
        return plan

    def with_extras(self, plan: SkipPlan) -> SkipPlan:
        """Stand-ins for the ffn sublayers that decoding may add without losing much.

        From the one that costs the least, as long as all together cost at most 4% of perplexity.
        """
        beside = self.fitter.beside(plan, self.recipe.rung)
        before = self.loss.text_loss(plan)
        alone = {s: self.loss.text_loss(_and(plan, beside, [s])) for s in beside.stand_ins}
        allowed: list[Sublayer] = []
        for sublayer in sorted(alone, key=lambda s: (alone[s], s)):
            loss = self.loss.text_loss(_and(plan, beside, [*allowed, sublayer]))
            if loss > before + _WORSE:
                break
            allowed.append(sublayer)
        self.say(f"decoding may add {len(allowed)} ffn sublayers")
        chosen = Compensation({s: beside.stand_ins[s] for s in allowed})
        return plan.with_compensation(plan.compensation.merged(chosen))

    def _fitter(self, most: int | None) -> Fitter:
        """On the first texts of each kind; all share one compiled model."""
        return self.fitter.on({kind: some[:most] for kind, some in self.learned.items()})

    def _asked(self, texts: Tokens, count: int, seed: int) -> list[Sample]:
        sources = [t for some in texts.values() for t in some]
        tokens = min(self.recipe.tokens, max(t.shape[1] for t in sources))
        return retrieval_samples(self.tokenizer, sources, count, tokens, most=1, seed=seed)


def _parted(texts: Tokens) -> tuple[Tokens, Tokens]:
    """To learn from, and every fifth to judge by: the last of each five, or of fewer."""
    held = {k: some[4::5] or some[-1:] for k, some in texts.items()}
    taken = {id(t) for some in held.values() for t in some}
    return {k: [t for t in some if id(t) not in taken] for k, some in texts.items()}, held


def _split(sample: Sample) -> tuple[Sample, int]:
    """A sample that asks once, and where its answer begins."""
    assert sample.weights is not None
    heavy = (sample.weights > 1.5 * sample.weights.min()).nonzero()
    return sample, int(heavy[0]) + 1


def _and(plan: SkipPlan, beside: Compensation, more: Sequence[Sublayer]) -> SkipPlan:
    """The plan with more sublayers skipped, in prefill as well, where they can be judged."""
    added = Compensation({s: beside.stand_ins[s] for s in more})
    skip = (*plan.prefill, *more)
    return SkipPlan.of(plan.sublayers, skip, compensation=plan.compensation.merged(added))
