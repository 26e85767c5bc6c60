"""Times from bytes and operations alone, as a latency table: what plans promise, unmeasured.

A decode step is taken to last as long as reading its weights, keys and values, and a prompt as long
as its products: the bounds that long contexts come close to. Speed-ups are ratios of such times, so
they are the same on every device; what launching, norms and activations cost is not in them, which
is why small models and short contexts gain less than is promised. A table that was measured
(`adaskip_fx.measurement.measure`) knows better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_passes.windows.find_attention import Attention

from ..kv_cache.layer_spec import LayerCacheSpec
from ..latency.table import LatencyTable, device_name
from ..latency.terms import OVERHEAD, Costs, TableError, heads_term, window_term
from ..plans.skip_plan import Phase, Sublayer
from ..plans.windows import Window
from ..profiles.fingerprint import fingerprint, unusual_layers
from ..utils.files import JSON
from .program_cache import Graphs

_BYTES = 1e12  # a second; neither rate matters to a speed-up
_OPERATIONS = 1e15


@dataclass(frozen=True)
class _Work:
    """What a part of the model does.

    Attributes:
        read: bytes of weights that a decode step reads.
        products: operations on weights for a token of a prompt.
        stored: bytes of keys and values of one token.
        pair: operations for a token of a prompt and one that it sees.
        sees: how many of the last tokens it sees at most; None for all.
    """

    read: float
    products: float
    stored: float = 0.0
    pair: float = 0.0
    sees: int | None = None

    def seconds(self, phase: Phase, context: int, window: Window | None = None) -> float:
        """Return the time of a prompt, or of a decode step, all of whose heads see `window`."""
        seen = context if self.sees is None else min(context, self.sees)
        seen = seen if window is None else min(seen, window.seen(context))
        if phase == "decode":
            return (self.read + self.stored * seen) / _BYTES
        pairs = seen * seen / 2 + (context - seen) * seen
        return (self.products * context + self.pair * pairs) / _OPERATIONS


def counted_times(graphs: Graphs, context: int, windows: Sequence[Window] = ()) -> LatencyTable:
    """Return the table of a model's times at one context, for one row.

    Args:
        graphs: of the model.
        context: tokens of a prompt, and tokens stored at a decode step.
        windows: those whose times are wanted.

    Raises:
        TableError: the model has layers that are not read or multiplied as plain ones are.
    """
    if unusual := unusual_layers(graphs.model):
        raise TableError(
            f"the time of {unusual} cannot be told from bytes and operations; measure a table "
            "(adaskip-fx measure) and pass table="
        )
    structure = graphs.structure
    work = {s: _work(graphs, s) for s in structure.sublayers if s not in structure.unskippable}
    classes = _classes(structure.sublayers, work)
    names = {classes[s]: work[s] for s in work}
    narrow = {classes[s] for s in work if s in structure.kv_heads}
    others = [_work(graphs, s) for s in structure.unskippable]
    costs = []
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        seconds = {name: part.seconds(phase, context) for name, part in names.items()}
        for name in narrow:
            seconds[heads_term(name)] = 0.0
            for window in windows:
                seconds[window_term(name, window)] = names[name].seconds(phase, context, window)
        rest = _of_weights(graphs, None).seconds(phase, 1)  # logits of one token
        seconds[OVERHEAD] = rest + sum(part.seconds(phase, context) for part in others)
        seconds["scale"] = 0.0
        costs.append(Costs(phase, context, seconds))
    about: dict[str, JSON] = {
        "device": device_name(graphs.model),
        "dtype": str(graphs.model.dtype).removeprefix("torch."),
        "layers": "",
        "batch": 1,
        "times": "counted from bytes and operations, not measured",
    }
    heads = tuple(structure.kv_heads.get(s, 0) for s in structure.sublayers) if windows else ()
    named = tuple(classes.get(s, "") for s in structure.sublayers)
    return LatencyTable(
        fingerprint(graphs.states.original), about, structure.sublayers, named, tuple(costs), heads
    )


def _classes(sublayers: Iterable[Sublayer], work: dict[Sublayer, _Work]) -> dict[Sublayer, str]:
    """Name each kind of sublayers, with a number where those of a kind do different work."""
    distinct: dict[str, list[_Work]] = {}
    for sublayer in (s for s in sublayers if s in work):
        known = distinct.setdefault(sublayer.kind, [])
        if work[sublayer] not in known:
            known.append(work[sublayer])
    return {
        s: s.kind if len(distinct[s.kind]) == 1 else f"{s.kind} {distinct[s.kind].index(part) + 1}"
        for s, part in work.items()
    }


def _work(graphs: Graphs, sublayer: Sublayer) -> _Work:
    structure, config = graphs.structure, graphs.model.config.get_text_config()
    part = _of_weights(graphs, sublayer)
    layers = [layer for layer, kind in structure.memory[sublayer] if kind == "attention"]
    if sublayer.kind != "attention" or not layers:
        return part
    spec: LayerCacheSpec = graphs.specs[layers[0]]
    queries = int(getattr(config, "num_attention_heads", spec.key_heads))
    known = structure.attention.get(sublayer)
    own = getattr(config, "sliding_window", None)
    hides = isinstance(known, Attention) and known.sees == "less" and isinstance(own, int)
    return _Work(
        part.read,
        part.products,
        stored=spec.only(["attention"]).nbytes(1, 1, graphs.model.dtype.itemsize),
        pair=2.0 * queries * (spec.key_dim + spec.value_dim),
        sees=own if hides else None,
    )


def _of_weights(graphs: Graphs, sublayer: Sublayer | None) -> _Work:
    """Return the work on weights of a sublayer, or of what comes after all of them."""
    read = products = 0.0
    for weight in graphs.structure.weights[sublayer]:
        share = _share(graphs.model.config.get_text_config(), weight)
        read += share * weight.numel() * weight.element_size()
        products += 2 * share * weight.numel() if weight.ndim > 1 else 0
    return _Work(read, products)


def _share(config: Any, weight: torch.Tensor) -> float:
    """Return how much of a weight one token uses: of experts that are stacked, those it goes to."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = "num_local_experts", "num_experts", "n_routed_experts"
    experts = {getattr(config, name, None) for name in names}
    stacked = weight.ndim == 3 and weight.shape[0] in experts
    return chosen / weight.shape[0] if stacked and isinstance(chosen, int) else 1.0
