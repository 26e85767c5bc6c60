"""From texts to a plan that keeps the most: choose, fit, distil, and say what decoding may add."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from adaskip_fx.calibration.tokenizer import Tokenizer
from adaskip_fx.model.check_model import check_model
from adaskip_fx.parallel.ranks import Ranks
from adaskip_fx.parallel.replicas import DataParallel
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip, PlanPolicy
from adaskip_fx.profiles.profile import Profile

from .session import FittingSession, Kinds, Say
from .spec import SurrogateSpec


@dataclass(frozen=True)
class Recipe:
    """How a plan is made.

    Attributes:
        search: whether to choose sublayers one by one by what is lost (`Greedy`, on texts and on
            answers to prompts that hide something); otherwise a policy chooses them.
        spec: what kind of surrogate to fit.
        synthetic_samples: samples of `max_length` tokens that the model writes itself, besides the
            texts.
        max_length: tokens of a sample at most.
        steps: of distillation; 0 for none.
        shortlist: sublayers that a search tries at each step, the most similar; None for all.
        extras: whether ffn sublayers get surrogates that decoding may add.
        seed: of all random choices.
        in_order: whether to fit surrogates in the order of the plan, later ones on what earlier
            ones have left; otherwise each is fitted as if it alone were skipped, in a small part of
            the time (see `Fitter.fit_independently`).
    """

    search: bool = True
    spec: SurrogateSpec = field(default_factory=lambda: SurrogateSpec("normalized"))
    synthetic_samples: int = 64
    max_length: int = 2048
    steps: int = 300
    shortlist: int | None = 32
    extras: bool = True
    seed: int = 0
    in_order: bool = True


def fit(
    model: Any,
    tokenizer: Tokenizer,
    texts: Kinds,
    profile: Profile,
    alpha: float,
    recipe: Recipe | None = None,
    *,
    policy: PlanPolicy | None = None,
    backend: str = "eager",
    say: Say = lambda _: None,
    data_parallel: DataParallel = False,
) -> SkipPlan:
    """Return a plan that skips as many sublayers as `alpha` says, with fitted surrogates.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: by kind (prose, code, ...), each what the model will be used on, or close to it;
            of each kind every fifth, and at least one of two, is held out for validation.
        profile: of the model.
        alpha: acceleration ratio, as for `skip_count`.
        recipe: see `Recipe`.
        policy: chooses sublayers where the recipe does not search; AdaSkip if None.
        backend: inner torch.compile backend; ``"eager"`` needs no compilation.
        say: called with a line of text at each stage.
        data_parallel: share the texts of moments among processes, as for
            :func:`adaskip_fx.calibrate`; all get the plan of the first.

    Raises:
        ValueError: no texts, or too few; an alpha that cannot be met; a profile of another model.
        UnsupportedError: the model cannot be captured, or gradients cannot flow through its graph.
    """
    recipe = recipe or Recipe()
    profile.check(check_model(model))
    session = FittingSession(
        model,
        tokenizer,
        texts,
        synthetic_samples=recipe.synthetic_samples,
        max_length=recipe.max_length,
        seed=recipe.seed,
        backend=backend,
        say=say,
        data_parallel=data_parallel,
    )
    first = partial(_of_first, session.fitter.replicas.ranks)
    if recipe.search:
        plan = first(session.search(profile, alpha, recipe.spec, recipe.shortlist)[-1])
    else:
        plan = (policy or AdaSkip()).plan(profile, alpha)
    plan = plan.with_fingerprint(profile.fingerprint)
    if not plan.prefill:
        return plan
    plan = session.fit(plan, recipe.spec, recipe.in_order)
    if recipe.steps:
        plan = first(session.distill(plan, recipe.steps))
    return first(session.add_extras(plan, recipe.spec)) if recipe.extras else plan


def _of_first(ranks: Ranks, plan: SkipPlan) -> SkipPlan:
    """Return the first process' plan: rounding may have had others decide otherwise."""
    return ranks.first("a plan of a fit", lambda: plan)
