"""``compile(budget="latency")``: a plan that is alpha times as fast by the clock of this device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

from ..latency.table import LatencyTable
from ..plans.decisions import Decision
from ..policies import AdaSkip, LatencyBudget, Policy
from ..profiles.profile import Profile
from ..runtime.runtime import Runtime
from .measure import measure

Budget = Literal["count", "latency"]


def check_budget(
    budget: str,
    context: int | None,
    table: LatencyTable | str | Path | None,
    policy: Policy | None,
    plan: Decision | None,
) -> None:
    """Refuse arguments of ``compile`` that do not go together.

    Raises:
        ValueError: says which, and what to do.
    """
    if budget not in get_args(Budget):
        raise ValueError(f"budget must be 'count' or 'latency', got {budget!r}")
    if budget == "count":
        if context is not None or table is not None:
            raise ValueError("context and table are for budget='latency'; pass it, or neither")
    elif context is None:
        raise ValueError(
            "budget='latency' needs context=, the tokens of a typical request: what a sublayer "
            "costs depends on them"
        )
    elif plan is not None:
        raise ValueError("budget='latency' chooses a plan; leave plan out")
    elif policy is not None and not isinstance(policy, AdaSkip):
        raise ValueError(
            f"budget='latency' chooses by AdaSkip's similarities, not by {type(policy).__name__}; "
            "leave policy out, or pass an AdaSkip(...)"
        )


def open_table(table: LatencyTable | str | Path | None, model: object) -> LatencyTable | None:
    """The table, read if it is a path; None stays None.

    Raises:
        TableError: it cannot be read, or is of another model, dtype or device.
    """
    if isinstance(table, str | Path):
        table = LatencyTable.load(table)
    if table is not None:
        table.check(model)
    return table


def choose_by_time(
    runtime: Runtime,
    profile: Profile,
    alpha: float,
    base: Policy | None,
    context: int,
    table: LatencyTable | None,
) -> None:
    """Give a compiled model the plan that meets `alpha` in both phases at `context` tokens.

    Args:
        runtime: of a model that was compiled without a plan; it may be asked to time steps.
        profile: of the model.
        alpha: speed-up over the full model.
        base: an AdaSkip, for similarities, scales and the online step; its defaults if None.
        context: tokens of a prompt, and tokens stored at a decode step.
        table: what sublayers cost; measured when None.

    Raises:
        ValueError: alpha cannot be met, or the table does not cover `context`.
    """
    costs = table if table is not None else measure(runtime.model, (context,))
    if costs.doubt:
        warnings.warn(costs.doubt, stacklevel=3)
    policy = LatencyBudget(costs, context, base=base if isinstance(base, AdaSkip) else AdaSkip())
    runtime.plan = policy.plan(profile, alpha)
    runtime.profile, runtime.policy = profile, policy
