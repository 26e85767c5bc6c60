"""`adaskip_fx.compile`: from a model and a profile to a model that skips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .capture.reference import run_reference
from .capture.traced_part import decoder_name
from .model.adapted import put_around
from .model.check_model import check_model
from .model.heads import check_causal, check_head
from .model.load import usable_backend
from .model.subclass import make_compiled_model
from .plans.decision_files import load_decision
from .plans.decisions import Decision
from .policies import AdaSkip, OnlinePolicy, Policy
from .policies.base import check_policy
from .profiles.profile import Profile
from .programs.program import Link
from .runtime.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .model.handle import CompiledModel


def compile(
    model: PreTrainedModel,
    profile: Profile | str | Path | None = None,
    alpha: float = 1.2,
    *,
    policy: Policy | None = None,
    plan: Decision | str | Path | None = None,
    backend: str = "inductor",
    link: Link = "pieces",
    max_variants: int = 32,
) -> CompiledModel:
    """Return a model that runs `model` with its least important sublayers skipped.

    The result shares `model`'s parameters and can be used wherever it was; `model` itself is not
    changed and stays usable. Graphs are captured here and at the first request of each kind
    (``.adaskip.warmup`` does it beforehand); a new plan is linked in milliseconds.

    Args:
        model: A transformers decoder in evaluation mode, with a language-model head or another
            (a classifier's, a reward's), whose code then runs as it is; or a ``PeftModel`` around
            one.
        profile: What :func:`adaskip_fx.calibrate` measured on this model, or the path it was
            saved to. None only with an explicit `plan`.
        alpha: The acceleration ratio; ``floor(S (1 - 1/alpha) + 1/2)`` of S sublayers are skipped
            (AdaSkip, arXiv 2501.02336). It is for a policy: an explicit `plan` has no use for it.
        policy: It chooses the sublayers; ``AdaSkip()`` when None. What it decides may also be a
            schedule of decode plans, or a choice among plans by the prompt; and it may count time
            instead of sublayers (`policies.LatencyBudget`).
        plan: An explicit plan, or other decision, or the path that one was saved to, instead of a
            policy's; nothing is learned online then.
        backend: The name of the torch.compile backend that compiles the pieces.
        link: ``"pieces"`` calls pieces compiled once; ``"fused"`` compiles the whole graph again
            for each plan.
        max_variants: How many linked programs to keep; the least recently used are dropped.

    Returns:
        A model of the same class, with ``.adaskip`` (a :class:`adaskip_fx.model.handle.Handle`)
        beside its methods. What is done to adapters of `model` later, it follows.

    Raises:
        TypeError, ValueError: A model, profile, alpha or plan cannot be used (a `PlanError` or
            `ProfileError` says which).
        RuntimeError: Inductor is to compile for the CPU and there is no C++ compiler.
        UnsupportedError: The architecture's sublayers cannot be captured or proven.
    """
    decoder = check_model(model)
    _check_options(backend, link, decoder)
    measured = Profile.load(profile) if isinstance(profile, str | Path) else profile
    if measured is not None:
        measured.check(decoder)
    options: dict[str, Any] = {"backend": backend, "link": link, "max_variants": max_variants}
    if plan is not None:
        decision = load_decision(Path(plan)) if isinstance(plan, str | Path) else plan
        return build(model, decision, profile=measured, **options)
    if measured is None:
        raise ValueError("compile needs a profile, or an explicit plan")
    chosen = policy if policy is not None else AdaSkip()
    check_policy(chosen, decoder)
    options["policy"] = chosen if isinstance(chosen, OnlinePolicy) else None
    return build(model, chosen.plan(measured, alpha), profile=measured, **options)


def build(model: Any, plan: Decision | None, **options: Any) -> CompiledModel:
    """Return a compiled model with an explicit plan; None for the empty one; see `Runtime`."""
    decoder = check_model(model)
    compiled: Any = make_compiled_model(decoder)
    reference, headed = run_reference(decoder), decoder_name(decoder) is not None
    if headed:
        check_causal(decoder, reference.steps["prefill"][0].ids[:1])
    compiled._adaskip = Runtime(compiled, decoder, reference, plan, **options)
    if headed:
        check_head(compiled)
    return put_around(compiled, model)  # type: ignore[no-any-return]


def _check_options(backend: str, link: str, model: Any) -> None:
    import torch

    if link not in ("pieces", "fused"):
        raise ValueError(f"link must be 'pieces' or 'fused', got {link!r}")
    known = torch.compiler.list_backends(exclude_tags=())
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(sorted(known))}")
    if usable_backend(backend, model.device)[0] != backend:
        raise RuntimeError(
            "Inductor needs a C++ compiler on CPU and none was found; install one (g++, or name it "
            'in CXX), or pass backend="eager"'
        )
