"""`adaskip_fx.compile`: from a model and a profile to a model that skips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .capture.reference import run_reference
from .capture.traced_part import decoder_name
from .latency.table import LatencyTable
from .model.adapted import put_around
from .model.check_model import check_model
from .model.heads import check_causal, check_head
from .model.load import usable_backend
from .model.subclass import make_compiled_model
from .parallel.ranks import Ranks
from .plans.decision_files import load_decision
from .plans.decisions import Decision
from .policies import AdaSkip, DescribedPolicy, OnlinePolicy, Policy, TimedBySimilarity
from .policies.base import check_policy
from .profiles.fingerprint import fingerprint
from .profiles.profile import Profile
from .programs.counted_times import counted_times
from .programs.program import Link
from .runtime.draft_with import draft_with
from .runtime.runtime import Runtime
from .runtime.turns import check_length
from .speculation.options import Lossless
from .utils.memory_budget import MemoryBudget, default_budget

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
    context: int | None = None,
    table: LatencyTable | str | Path | None = None,
    decoding: Lossless | None = None,
    backend: str = "inductor",
    link: Link = "pieces",
    memory_budget: int | None = None,
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
            (AdaSkip, arXiv 2501.02336). With `context` it is predicted time, of each phase. It is
            for a policy: an explicit `plan` has no use for it.
        policy: It chooses the sublayers; ``AdaSkip()`` when None. What it decides may also be a
            schedule of decode plans, or a choice among plans by the prompt.
        plan: An explicit plan, or other decision, or the path that one was saved to, instead of a
            policy's; nothing is learned online then.
        context: Tokens of a prompt, and tokens stored at a step, at which `alpha` counts time, for
            `policies.TimedBySimilarity`, which skips, or uses windows that the profile has.
        table: The times at `context`, or the path they were saved to (``adaskip-fx measure``). If
            None they are counted from bytes and operations: at once, and the same on every device,
            but small models and short contexts gain less than that promises.
        decoding: ``Lossless()`` has requests run the full model: what is left out by the plan only
            drafts tokens, which are verified several at once; ``Bounded()`` loses a little. Then a
            profile or plan is not needed; without, drafts are looked up in the text.
        backend: The name of the torch.compile backend that compiles the pieces.
        link: ``"pieces"`` calls pieces compiled once; ``"fused"`` compiles the whole graph again
            for each plan.
        memory_budget: How many bytes to keep for later steps and requests: captured graphs, linked
            programs, CUDA graphs, and K/V buffers of requests that have ended. What was not used
            for the longest time goes first. Weights do not count, nor do the caches of requests
            that somebody holds. An eighth of the device's memory if None (of main memory on CPU).

    Returns:
        A model of the same class, with ``.adaskip`` (a :class:`adaskip_fx.model.handle.Handle`)
        beside its methods. What is done to adapters of `model` later, it follows.

    Raises:
        TypeError, ValueError: A model, profile, alpha, plan or table cannot be used (a `PlanError`,
            `ProfileError` or `TableError` says which), or no plan reaches alpha at `context`.
        RuntimeError: Inductor is to compile for the CPU and there is no C++ compiler.
        UnsupportedError: The architecture's sublayers cannot be captured or proven.
        RanksError: The model is on several ranks, and they do not compile the same.
    """
    decoder = check_model(model)
    ranks = joined(decoder)
    given = profile, alpha, policy, plan, context, table
    without = decoding is not None and profile is None and plan is None
    choose = partial(_choose, decoder, backend, link, without, *given)
    measured, chosen = ranks.together("choosing what to skip", choose)
    digest = None if measured is None else measured.digest
    ranks.agree("the profile, alpha and options to compile with", (digest, alpha, context, link))
    options: dict[str, Any] = {"backend": backend, "link": link, "memory_budget": memory_budget}
    return build(model, profile=measured, decoding=decoding, **chosen, **options)


def _choose(
    model: Any,
    backend: str,
    link: str,
    without: bool,
    profile: Profile | str | Path | None,
    *given: Any,
) -> tuple[Profile | None, dict[str, Any]]:
    """Return the profile, and what `_chosen` returns of the same arguments; `without` any, none."""
    _check_options(backend, link, model)
    measured = Profile.load(profile) if isinstance(profile, str | Path) else profile
    if measured is not None:
        measured.check(model)
    return measured, {"plan": None} if without else _chosen(model, measured, *given)


def _chosen(
    model: Any,
    profile: Profile | None,
    alpha: float,
    policy: Policy | None,
    plan: Decision | str | Path | None,
    context: int | None,
    table: LatencyTable | str | Path | None,
) -> dict[str, Any]:
    """Return what to build a model with: a plan, or what chooses one, and what is known of it."""
    if context is None and table is not None:
        raise ValueError("table tells the times at a context: give context= as well")
    if context is not None and (plan is not None or policy is not None):
        raise ValueError(
            "context is for the plan that compile chooses by alpha; "
            f"{'a policy' if plan is None else 'an explicit plan'} was given"
        )
    if plan is not None:
        return {"plan": load_decision(Path(plan)) if isinstance(plan, str | Path) else plan}
    if profile is None:
        raise ValueError("compile needs a profile, or an explicit plan")
    if context is not None:
        times = LatencyTable.load(table) if isinstance(table, str | Path) else table
        if times is not None:
            times.check(model)
        choose = partial(_choose_in_time, profile=profile, alpha=alpha, table=times)
        return {"plan": None, "prepare": partial(choose, context=context)}
    chosen = policy if policy is not None else AdaSkip()
    check_policy(chosen, model)
    return {
        "plan": chosen.plan(profile, alpha),
        "policy": chosen if isinstance(chosen, OnlinePolicy) else None,
        "describe": chosen.describe if isinstance(chosen, DescribedPolicy) else None,
    }


def build(
    model: Any,
    plan: Decision | None,
    *,
    prepare: Callable[[Runtime], None] | None = None,
    decoding: Lossless | None = None,
    memory_budget: int | None = None,
    **options: Any,
) -> CompiledModel:
    """Return a compiled model with an explicit plan; None for the empty one; see `Runtime`.

    `prepare` is given what the model runs on before anybody else is. With `decoding` the plan is
    what drafts leave out, and requests begin with the empty one.
    """
    decoder = check_model(model)
    ranks = joined(decoder)
    named = (str(options.get(name)) for name in ("backend", "link"))
    default = partial(default_budget, decoder.device)
    limit = memory_budget if memory_budget is not None else ranks.first("a budget", default)
    budget, digest = MemoryBudget(limit), None if plan is None else plan.digest
    ranks.agree("the plan and options to compile with", (digest, *named, limit))
    compiled: Any = make_compiled_model(decoder)
    headed = decoder_name(decoder) is not None
    reference = ranks.together("the model's own logits", lambda: run_reference(decoder))
    if headed:
        check_causal(decoder, reference.steps["prefill"][0].ids[:1])
    compiled._adaskip = Runtime(compiled, decoder, reference, plan, budget=budget, **options)
    if headed:
        check_head(compiled)
    if prepare is not None:
        prepare(compiled._adaskip)
    if decoding is not None:
        draft_with(compiled._adaskip, decoding)
    return put_around(compiled, model)  # type: ignore[no-any-return]


def joined(model: Any) -> Ranks:
    """Return the ranks of a decoder, which have come to this place and know its fingerprint."""
    ranks = Ranks.of(model)
    if not ranks.alone:
        fingerprint(model)
    return ranks


def _choose_in_time(
    runtime: Runtime, profile: Profile, alpha: float, context: int, table: LatencyTable | None
) -> None:
    """Give a model the plan that is `alpha` times as fast at `context` tokens."""
    check_length(runtime.graphs, context)
    windows = () if profile.windows is None else profile.windows.windows
    times = table if table is not None else counted_times(runtime.graphs, context, windows)
    policy = TimedBySimilarity(times, context)
    runtime.describe = partial(policy.describe, profile=profile)
    runtime.set_plan(policy.plan(profile, alpha))


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
