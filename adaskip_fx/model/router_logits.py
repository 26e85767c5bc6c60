"""The router logits of a mixture of experts, and its auxiliary loss, of what runs under the plan.

The values come out of the programs; the auxiliary loss, and the loss of labels with it, are made
of them by the model's own code, which runs with the decoder and the head stood in for.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast

from adaskip_passes import UnsupportedError
from adaskip_passes.transforms.inner_values import InnerValues

from ..capture.check_graph import relative_error
from ..capture.state import State
from ..kv_cache.argument_names import output_fields
from ..kv_cache.cache import SkipCache
from ..plans.skip_plan import PlanError, SkipPlan
from ..programs.instruments import Instrument
from ..utils.expert_internals import router_class
from .hidden_states import eager_twin
from .stand_in import with_stand_in

if TYPE_CHECKING:
    from ..programs.program import Program
    from .types import CompiledCausalLM

_ITS_OWN = frozenset({"output_router_logits", "labels", "num_items_in_batch"})
#: Values of a router's as wide as there are experts; its logits are among the first.
_MOST_VALUES = 6

_proven: WeakKeyDictionary[State, InnerValues] = WeakKeyDictionary()


def without_routers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without what router logits have a part in.

    The same ones, if the call asks for no router logits.
    """
    if arguments.get("output_router_logits") is not True:
        return arguments
    return {k: v for k, v in arguments.items() if k not in _ITS_OWN}


class RouterRecorder(Instrument):
    """Keeps the router logits of a step, [B x T, experts] of each layer that runs."""

    def __init__(self, values: InnerValues) -> None:
        self.passes = (values,)
        self.values: tuple[torch.Tensor, ...] = ()
        self._steps = 0

    @property
    def key(self) -> Hashable:
        """What identifies its programs."""
        return type(self), self.passes

    def read(
        self, program: Program, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the values of sublayers that run; return logits and statistics."""
        self._steps += 1
        if self._steps > 1:
            raise NotImplementedError(
                "forward(output_router_logits=...) under a plan that runs the last token in full "
                "is not supported by adaskip_fx yet; call the original model"
            )
        logits, *values = outputs
        statistics = values.pop() if program.probed else None
        routed = [s for s in program.captured.sublayers if s.kind == "ffn"][-len(values) :]
        runs = set(program.runs)
        pairs = zip(routed, values, strict=True)
        self.values = tuple(v for s, v in pairs if s in runs)
        return logits, statistics


@torch.no_grad()
def router_values(model: CompiledCausalLM) -> InnerValues:
    """Return which value of its FFNs a model's router logits are; seen once, on a few tokens.

    Raises:
        NotImplementedError: none is, or the model makes something else of them.
    """
    state = model._adaskip.graphs.states.look()
    if state not in _proven:
        kind, name = router_class(model), type(model).__name__
        values = _found(model, state, kind) if kind is not None else None
        if values is None:
            raise NotImplementedError(
                f"{name} has no router logits, or others than one value of each FFN, so "
                "forward(output_router_logits=...) is not supported by adaskip_fx yet; call the "
                "original model"
            )
        _proven[state] = values
    return _proven[state]


def _found(model: CompiledCausalLM, state: State, kind: type) -> InnerValues | None:
    runtime = model._adaskip
    ids = state.reference.steps["prefill"][0].ids[:1].to(runtime.device)
    asked = {"output_router_logits": True, "use_cache": False, "return_dict": True}
    twin = eager_twin(model)
    if twin is None:
        return None
    with state.reference.implementations_of(twin):
        theirs = type(twin).forward(twin, input_ids=ids, **asked)
    if not theirs.router_logits:
        return None
    for choice in range(_MOST_VALUES):
        values = InnerValues(frozenset({kind.__name__}), theirs.router_logits[0].shape[-1], choice)
        recorder = RouterRecorder(values)
        plan = SkipPlan.empty(runtime.sublayers)
        cache = runtime.new_cache(plan=plan, instrument=recorder)
        try:
            logits = runtime.step(ids, None, None, cache, 0)
        except (UnsupportedError, PlanError):  # a program without such a value
            return None
        mine = routed_output(model, {"input_ids": ids, **asked}, logits, None, recorder.values)
        pairs = list(zip(mine.router_logits, theirs.router_logits, strict=False))
        pairs += [(mine.logits, theirs.logits), (mine.aux_loss, theirs.aux_loss)]
        same = len(mine.router_logits) == len(theirs.router_logits)
        if same and all(_is_same(a, b, state) for a, b in pairs):
            return values
    return None


def _is_same(mine: torch.Tensor, theirs: torch.Tensor, state: State) -> bool:
    if mine.shape != theirs.shape:
        return False
    flat = mine.reshape(1, 1, -1), theirs.reshape(1, 1, -1)
    return relative_error(*flat) <= state.reference.tolerance


@torch.no_grad()
def routed_output(
    model: CompiledCausalLM,
    arguments: Mapping[str, Any],
    logits: torch.Tensor,
    cache: SkipCache | None,
    values: tuple[torch.Tensor, ...],
) -> Any:
    """Return what the model's own code makes of logits and router logits.

    Args:
        model: a compiled model.
        arguments: of the call.
        logits: [B, kept, V], which the head would make.
        cache: the request's; None where the caller wants none.
        values: the router logits of the layers that ran.
    """
    kind: Any = type(model._adaskip.graphs.states.original)
    whole: Any = model
    head = whole.get_output_embeddings()
    names = [n for n, module in whole.named_modules() if module is head]
    batch, tokens = _shape(arguments)
    hidden = logits.new_zeros(batch, tokens, 1)
    output = MoeModelOutputWithPast(
        last_hidden_state=hidden,
        router_logits=values,
        **output_fields(MoeModelOutputWithPast, cache),
    )
    twin = with_stand_in(model, kind, [kind.base_model_prefix], lambda *a, **k: output)
    twin = with_stand_in(twin, kind, names[0].split("."), lambda *a, **k: logits)
    given = {k: v for k, v in arguments.items() if v is not cache or v is None}
    return kind.forward(twin, **given)


def _shape(arguments: Mapping[str, Any]) -> tuple[int, int]:
    tokens = arguments.get("input_ids")
    tokens = tokens if tokens is not None else arguments["inputs_embeds"]
    return tokens.shape[0], tokens.shape[1]
