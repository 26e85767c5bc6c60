"""Whether tokens of a request can be drafted, and how far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..capture.rotary import switches_at
from ..kv_cache.cache import SkipCache
from ..plans.decisions import Schedule
from ..plans.phase_split import as_decode
from ..utils.transformers_types import ModelKwargs

if TYPE_CHECKING:
    from .types import CompiledCausalLM


def serves(cache: SkipCache) -> bool:
    """Return whether tokens can be drafted: they can be taken back, and steps have one plan."""
    return not cache.stateful and not isinstance(cache.request.decision, Schedule)


def positions(model: CompiledCausalLM) -> int:
    """Return how many tokens a block may reach: what is beyond is decoded in plain steps.

    A model may have no more positions, or another set of rotary frequencies there, while a plain
    step has those of its own length.
    """
    table = model._adaskip.graphs.max_length
    return min([*switches_at(model), *([] if table is None else [table])], default=2**62)


def look_up_blocks(model: CompiledCausalLM, cache: SkipCache) -> None:
    """Look up what verifications of a request will need, whose prompt has been begun."""
    plan = as_decode(cache.request.plan_at(cache.length))
    model._adaskip.runner.static.look_up(cache.request, plan, cache)


def leave_out_positions(model: CompiledCausalLM, model_kwargs: ModelKwargs) -> None:
    """Leave positions out of forward's arguments where they count on from the cache.

    Forward counts by itself, so nothing need be made of them in every round. The host reads the
    last one of each row, once. (Models of images keep positions on themselves besides.)
    """
    positions = model_kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or model._adaskip.decoder_path:
        return
    stored = model_kwargs[model._adaskip.generate_argument].length
    if bool((positions[:, -1] == stored).all()):
        del model_kwargs["position_ids"]
