"""From texts to a plan that keeps the most: choose, fit, refine, and say what decoding may add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip, PlanPolicy
from adaskip_fx.profiles.profile import Profile

from .session import FittingSession, Kinds, Say
from .spec import SurrogateSpec


@dataclass(frozen=True)
class Recipe:
    """How a plan is made.

    search: choose sublayers one by one by what is lost (`Greedy`, on texts and on answers to
        prompts that hide something); without, by the policy that is given.
    rung: what stands in for them.
    in_order: fit surrogates in the order of the plan, later ones on what earlier ones have left; if
        not, each as if it alone were skipped, in a small part of the time (see `Fitter.alone`).
    own: samples of `tokens` tokens that the model writes itself, besides those that are given.
    tokens: of a sample at most.
    steps: of refinement; 0 for none.
    shortlist: sublayers that a search tries at each step, the most similar; None for all.
    extras: whether ffn sublayers get surrogates that decoding may add.
    seed: of all that is drawn.
    """

    search: bool = True
    rung: SurrogateSpec = field(default_factory=lambda: SurrogateSpec("normalized"))
    own: int = 64
    tokens: int = 2048
    steps: int = 300
    shortlist: int | None = 32
    extras: bool = True
    seed: int = 0
    in_order: bool = True


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
    """A plan that skips as many sublayers as `alpha` says, with fitted surrogates.

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
        UnsupportedError: the model cannot be captured, or gradients cannot flow through its graph.
    """
    recipe = recipe or Recipe()
    workshop = FittingSession(
        model,
        tokenizer,
        texts,
        own=recipe.own,
        tokens=recipe.tokens,
        seed=recipe.seed,
        backend=backend,
        say=say,
    )
    if recipe.search:
        plan = workshop.searched(profile, alpha, recipe.rung, recipe.shortlist)[-1]
    else:
        plan = (policy or AdaSkip()).plan(profile, alpha)
    if not plan.prefill:
        return plan
    plan = workshop.fitted(plan, recipe.rung, recipe.in_order)
    if recipe.steps:
        plan = workshop.refined(plan, recipe.steps)
    return workshop.with_extras(plan, recipe.rung) if recipe.extras else plan
