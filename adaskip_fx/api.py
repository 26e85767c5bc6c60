"""`adaskip_fx.compile`: from a model and a profile to a model that skips."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from .capture.reference import run_reference
from .model.check_model import check_model
from .model.load import usable_backend
from .model.subclass import make_compiled_model
from .plans.decisions import Decision
from .plans.serialization import load_decision
from .policies import AdaSkip, OnlinePolicy, Policy
from .policies.base import check_policy
from .profiles.profile import Profile
from .programs.program import Link
from .runtime.runtime import Runtime

Model = TypeVar("Model")


def compile(
    model: Model,
    profile: Profile | str | Path | None = None,
    alpha: float = 1.2,
    *,
    policy: Policy | None = None,
    plan: Decision | str | Path | None = None,
    backend: str = "inductor",
    link: Link = "pieces",
    max_variants: int = 32,
) -> Model:
    """A model that runs `model` with its least important sublayers skipped.

    The result shares `model`'s parameters and can be used wherever it was; `model` itself is not
    changed and stays usable. Graphs are captured here and at the first request of each kind
    (``.adaskip.warmup`` does it beforehand); a new plan is linked in milliseconds.

    Args:
        model: a transformers decoder with a language-model head, in evaluation mode.
        profile: what :func:`adaskip_fx.calibrate` measured on this model, or the path it was
            saved to. None only with an explicit `plan`.
        alpha: acceleration ratio; ``floor(S (1 - 1/alpha) + 1/2)`` of S sublayers are skipped
            (AdaSkip, arXiv 2501.02336).
        policy: chooses the sublayers; ``AdaSkip()`` when None. What it decides may also be a
            schedule of decode plans, a choice among plans by the prompt, or a plan per stage; and
            it may count time instead of sublayers (`policies.LatencyBudget`).
        plan: an explicit plan, or other decision, or the path that one was saved to, instead of a
            policy's; nothing is learned online then.
        backend: name of the torch.compile backend that compiles the pieces.
        link: ``"pieces"`` calls pieces compiled once; ``"fused"`` compiles the whole graph anew
            for each plan.
        max_variants: linked programs to keep; the least recently used are dropped.

    Raises:
        TypeError, ValueError: a model, profile, alpha or plan that cannot be used.
        RuntimeError: Inductor is to compile for the CPU and there is no C++ compiler.
        UnsupportedError: the architecture's sublayers cannot be captured or proven.
    """
    check_model(model)
    _check_options(backend, link)
    _check_compiler(backend, model)
    decision = load_decision(Path(plan)) if isinstance(plan, str | Path) else plan
    loaded = Profile.load(profile) if isinstance(profile, str | Path) else profile
    if loaded is not None:
        loaded.check(model)
    chosen = policy if policy is not None else AdaSkip()
    if decision is None:
        if loaded is None:
            raise ValueError("compile needs a profile, or an explicit plan")
        check_policy(chosen, model)
        decision = chosen.plan(loaded, alpha)
        online = chosen if isinstance(chosen, OnlinePolicy) else None
    else:
        online = None
    compiled: Model = build(
        model,
        decision,
        profile=loaded,
        policy=online,
        backend=backend,
        link=link,
        max_variants=max_variants,
    )
    return compiled


def build(model: Any, plan: Decision | None, **options: Any) -> Any:
    """A compiled model with an explicit plan; None for the empty one. Options as for `Runtime`."""
    shell = make_compiled_model(model)
    shell._adaskip = Runtime(shell, model, run_reference(model), plan, **options)
    return shell


def _check_options(backend: str, link: str) -> None:
    import torch

    if link not in ("pieces", "fused"):
        raise ValueError(f"link must be 'pieces' or 'fused', got {link!r}")
    known = torch.compiler.list_backends(exclude_tags=())
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(sorted(known))}")


def _check_compiler(backend: str, model: Any) -> None:
    if usable_backend(backend, model.device)[0] != backend:
        raise RuntimeError(
            "Inductor needs a C++ compiler on CPU and none was found; install one (g++, or name it "
            'in CXX), or pass backend="eager"'
        )
