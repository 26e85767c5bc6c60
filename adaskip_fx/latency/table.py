"""What each sublayer costs on one device, as a table: measured once, used to predict and to choose.

The time of a prompt or of a decode step is taken to be a sum: one cost for each sublayer that runs,
one for each surrogate, and the overhead (what comes before and after the sublayers, and launching
it all). Sublayers that run the same code are of one class, and have one cost.
`adaskip_fx.measurement.measure` measures the table.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from adaskip_fx.latency.terms import (
    Costs,
    TableError,
    Weights,
    between,
    cost_terms,
    goals_of,
    named,
    weights_of,
)
from adaskip_fx.plans.skip_plan import Phase, SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.profiles.fingerprint import Fingerprint, fingerprint, is_of, unusual_layers
from adaskip_fx.utils.files import (
    JSON,
    canonical_digest,
    check_digest,
    read_document,
    write_atomically,
)

SCHEMA = 1
_KEYS = ("digest", "fingerprint", "conditions", "sublayers", "classes", "costs")
_LARGE_ERROR = 0.05  # relative: from here on a table has a warning
_REDO = "measure again (adaskip-fx measure)"


@dataclass(frozen=True)
class LatencyTable:
    """Costs of a model's sublayers on one device. Immutable, equal by value.

    Attributes:
        fingerprint: identifies the model.
        conditions: device, dtype, batch, backend and versions.
        sublayers: all of the model's, in stream order.
        classes: the class of each of them; sublayers of one class run the same code. Empty for one
            that cannot be skipped, whose cost is part of the overhead.
        costs: one entry for each phase and context.
        kv_heads: how many K/V heads each sublayer has, 0 for what can have no window; empty in a
            table without windows.

    Raises:
        TableError: a sublayer has no class, or a class no cost.
    """

    fingerprint: Fingerprint
    conditions: Mapping[str, JSON]
    sublayers: tuple[Sublayer, ...]
    classes: tuple[str, ...]
    costs: tuple[Costs, ...]
    kv_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", MappingProxyType(dict(self.conditions)))
        if len(self.sublayers) != len(self.classes) or not self.costs:
            raise TableError("a table needs one class for each sublayer, and costs")
        if self.kv_heads and len(self.kv_heads) != len(self.sublayers):
            raise TableError("a table has a number of K/V heads for each sublayer, or none")
        for costs in self.costs:
            missing = set(self.classes) - {""} - set(costs.seconds)
            if missing:
                raise TableError(f"{costs.phase} at {costs.context}: no cost of {min(missing)}")

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        about = (self.fingerprint, dict(self.conditions))
        return LatencyTable, (*about, self.sublayers, self.classes, self.costs, self.kv_heads)

    def at(self, phase: Phase, context: int) -> Mapping[str, float]:
        """Return seconds by cost term at `context` tokens, interpolated.

        In decode a cost grows linearly with the stored tokens (KnapSpec, arXiv 2602.20217); in
        prefill a sublayer's cost of one token grows linearly with the prompt.

        Raises:
            TableError: `context` is outside of what was measured.
        """
        known = sorted((c for c in self.costs if c.phase == phase), key=lambda c: c.context)
        for costs in known:
            if costs.context == context:
                return costs.seconds
        for low, high in pairwise(known):
            if low.context < context < high.context:
                return between(low, high, context)
        measured = ", ".join(f"{c.context:,}" for c in known) or "none"
        raise TableError(
            f"{phase} at {context:,} tokens: measured were {measured}; {_REDO} with a context on "
            "either side of it"
        )

    def seconds(self, plan: SkipPlan, phase: Phase, context: int) -> float:
        """Return the predicted seconds of a prompt, or of a decode step.

        Args:
            plan: what runs.
            phase: prefill or decode.
            context: tokens of the prompt, or tokens stored at the decode step.

        Raises:
            TableError: the plan is of another model, or does what was not measured.
        """
        counts = cost_terms(plan, phase, self.sublayers, self.classes, self.kv_heads)
        return sum(count * self.cost(name, phase, context) for name, count in counts.items())

    def cost(self, term: str, phase: Phase, context: int) -> float:
        """Return the seconds of one cost term: a class of sublayers, a surrogate, or `OVERHEAD`.

        Raises:
            TableError: it was not measured.
        """
        costs = self.at(phase, context)
        if term not in costs:
            raise TableError(
                f"the cost of {term!r} was not measured (known: {', '.join(sorted(costs))}); "
                f"{_REDO} with it"
            )
        return costs[term]

    def predict(self, plan: SkipPlan, phase: Weights, context: int) -> float:
        """Return the predicted speed-up: seconds of the full model over seconds of `plan`.

        Args:
            plan: what runs.
            phase: one phase, or how often each counts.
            context: tokens of the prompt, and tokens stored at a decode step.

        Raises:
            TableError: as for `seconds`.
            ValueError: an unknown phase, or weights that are negative or all 0.
        """
        weights = weights_of(phase)

        def seconds(plan: SkipPlan) -> float:
            return sum(w * self.seconds(plan, name, context) for name, w in weights.items())

        return seconds(SkipPlan.empty(self.sublayers)) / seconds(plan)

    def speed_ups(
        self, plan: SkipPlan, phase: Weights | Literal["both"], context: int
    ) -> dict[str, float]:
        """Return the predicted speed-up for each thing that is to be faster, by its name.

        Raises:
            TableError, ValueError: as for `predict`.
        """
        return {named(goal): self.predict(plan, goal, context) for goal in goals_of(phase)}

    def check(self, model: Any) -> None:
        """Refuse a model, a dtype or a device that this table was not measured on.

        Raises:
            TableError: the message says what differs and what to do.
        """
        found = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_name(model),
            "layers": unusual_layers(model),
        }
        if not is_of(self.fingerprint, model):
            actual = fingerprint(model)
            raise TableError(f"the table is of the model {self.fingerprint}, not {actual}; {_REDO}")
        for name, value in found.items():
            measured = self.conditions.get(name, "")
            if value != measured:
                raise TableError(
                    f"the table was measured with {name} {measured or 'of plain weights'}, but the "
                    f"model has {value or 'plain weights'}; {_REDO}, or make a plan with it and "
                    "pass that"
                )

    @property
    def warning(self) -> str:
        """Where measured times do not add up, as a sentence; empty where they do."""
        worst = max(self.costs, key=lambda c: c.error)
        if worst.error <= _LARGE_ERROR:
            return ""
        return (
            f"measured times do not add up: the sum of cost terms is off by {worst.error:.1%} in "
            f"{worst.phase} at {worst.context:,} tokens, so that speed-ups may be missed by as "
            "much; measure again while nothing else runs on the device, or with more rounds"
        )

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the content."""
        return canonical_digest(self._content())

    def save(self, path: str | Path) -> None:
        """Write the table to the file `path` (JSON); the old file stays until the new is whole."""
        document = {"schema": SCHEMA, "digest": self.digest, **self._content()}
        write_atomically(Path(path), json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Return a saved table.

        Raises:
            TableError: the message says which file, what is wrong and what to do.
        """
        path = Path(path)
        data = read_document(path, SCHEMA, _KEYS, TableError, _REDO)
        try:
            table = cls(
                Fingerprint(**data["fingerprint"]),
                data["conditions"],
                tuple(map(Sublayer.parse, data["sublayers"])),
                tuple(data["classes"]),
                tuple(Costs(**costs) for costs in data["costs"]),
                tuple(data.get("kv_heads", ())),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise TableError(f"{path}: not a valid latency table ({error}); {_REDO}") from error
        check_digest(path, data["digest"], table.digest, TableError, _REDO)
        return table

    def _content(self) -> dict[str, JSON]:
        heads: dict[str, JSON] = {"kv_heads": list(self.kv_heads)} if self.kv_heads else {}
        return {
            **heads,
            "fingerprint": asdict(self.fingerprint),
            "conditions": dict(self.conditions),
            "sublayers": [str(s) for s in self.sublayers],
            "classes": list(self.classes),
            "costs": [
                {
                    "phase": c.phase,
                    "context": c.context,
                    "seconds": dict(c.seconds),
                    "error": c.error,
                }
                for c in self.costs
            ],
        }

    def __str__(self) -> str:
        """Return a heading, the conditions, and a row for each phase and context, in ms."""
        counts = Counter(name for name in self.classes if name)
        names = list(dict.fromkeys(name for c in self.costs for name in c.seconds))
        titles = [f"{n} ({counts[n]})" if n in counts else n for n in names]
        rows = [["phase", "context", *titles, "off by"]]
        for c in self.costs:
            cells = [f"{1000 * c.seconds[n]:.4g}" if n in c.seconds else "" for n in names]
            rows.append([c.phase, f"{c.context:,}", *cells, f"{c.error:.1%}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (" | ".join(map(str.rjust, row, widths)) for row in rows)
        about = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        model = self.fingerprint.model_type
        return "\n".join([f"LatencyTable {self.digest[:8]}: {model}, ms; {about}", *lines])


def is_table(path: Path) -> bool:
    """Return whether the file at `path` looks like a latency table."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "costs" in data and "classes" in data


def device_name(model: Any) -> str:
    """Return the model's device as a person would call it: the GPU's or the processor's name."""
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type.upper()} ({platform.machine()})"
