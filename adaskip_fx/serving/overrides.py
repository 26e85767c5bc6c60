"""A plan in a model's configuration, as an engine is given it and reads it.

The whole plan stands there, not the path of its file: an engine names its compiled programs by the
configuration's text, so another plan is never run by the programs of this one. Tensors of
surrogates are in a file, whose name is the digest of what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaskip_fx.plans import plan_file
from adaskip_fx.plans.actions import Phase, PlanError
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.serving.static_plan import static_plan
from adaskip_fx.utils.files import JSON

KEY = "adaskip"  #: of the configuration
_FOLDER = "folder"  #: where the tensors' file is


def overrides(plan: SkipPlan, folder: str | Path, phase: Phase | None = None) -> dict[str, JSON]:
    """Return what ``vllm serve --hf-overrides`` is given, as a dictionary.

    Args:
        plan: Any plan that is one for both phases, or of which `phase` is chosen.
        folder: Where the file of the plan's tensors is, or is written if it is not there.
        phase: See `static_plan`.

    Raises:
        PlanError: See `static_plan`.
    """
    served = static_plan(plan, phase)
    document = served.to_json()
    name = document["tensors"]
    if name is not None:
        path = Path(folder).resolve()
        if not (path / str(name)).is_file():  # a phase alone may have fewer than the whole plan
            plan_file.save_tensors(served, path)
        document = {**document, _FOLDER: str(path)}
    return {KEY: document}


def plan_of(config: Any) -> SkipPlan | None:
    """Return the plan in a transformers configuration; None where there is none.

    Raises:
        PlanError: What is there is no plan, was edited, or differs by phase; or its tensors are
            not where it says.
    """
    data = getattr(config, KEY, None)
    if data is None:
        return None
    where = f"{KEY} of the model's configuration"
    if not isinstance(data, Mapping):
        raise PlanError(
            f"{where}: not an object but {data!r}; give what `adaskip-fx export --vllm` prints"
        )
    content = {k: v for k, v in data.items() if k != _FOLDER}
    folder = data.get(_FOLDER, ".")
    plan = plan_file.parse(SkipPlan, content, where, Path(str(folder)))
    return static_plan(plan)
