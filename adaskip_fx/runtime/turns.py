"""How a request goes on: where it begins, which phase a step is of, where a turn ends.

A turn is a prompt and the tokens decoded after it. A prompt after decoded tokens begins another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from weakref import WeakSet

import torch

from ..capture.arguments import is_embedded
from ..capture.graph_key import GraphPhase
from ..kv_cache.cache import SkipCache
from ..plans.decisions import PlanChooser
from ..plans.skip_plan import PlanError
from ..programs.program_cache import Graphs
from .inputs import Inputs
from .request import Request
from .window import Learner

logger = logging.getLogger(__name__)

_said: WeakSet[Graphs] = WeakSet()  # what a user was told of that a text is longer than usual


def phase_of(input_ids: torch.Tensor, cache: SkipCache) -> GraphPhase:
    """Return the phase of a step with new tokens int64 [B, T], or embeddings [B, T, H].

    One token after others is decoded, unless somebody said that it is a prompt.
    """
    if cache.length and input_ids.shape[1] == 1 and not cache.prompting:
        return "decode"
    return "extend" if cache.length else "prefill"


def begin(cache: SkipCache, graphs: Graphs) -> None:
    """Begin the cache's request in the state that the model is in now, which it keeps."""
    since, request = graphs.states.begin(), cache.request
    request.since = since
    request.weights.clear()
    request.bindings.clear()
    request.on_views = None
    if not cache.length:
        device = next(graphs.model.parameters()).device
        stored, retention = graphs.stored(request.plan), graphs.retention(request.plans)
        cache.renew(since.state.reference.specs, stored, retention, graphs.model.dtype, device)


def next_turn(cache: SkipCache, decoded: bool, learner: Callable[[], Learner | None]) -> Request:
    """Return the state of the cache's request for a step of a prompt, or of decoded tokens.

    Args:
        cache: The request's.
        decoded: A prompt after decoded tokens begins a new turn.
        learner: It is called at the first decode step of a turn: what the turn learns with.
    """
    request: Request = cache.request
    if not decoded:
        return request.new_turn() if request.decoding else request
    if not request.decoding:
        request.decoding, request.decoding_from = True, cache.length
        if request.learns and not isinstance(request.decision, PlanChooser):
            request.decode.learn_with(learner())
    return request


def choose_plan(cache: SkipCache, inputs: Inputs, graphs: Graphs) -> Request:
    """Return the cache's request with the plan that is chosen for its first prompt.

    The cache stores what that plan needs from now on.

    Raises:
        PlanError: A plan was chosen that is none of the decision's, and so was never validated.
        NotImplementedError: The prompt is given by embeddings, which nothing chooses by.
    """
    request: Request = cache.request
    if not isinstance(request.decision, PlanChooser):
        raise ValueError("this request has nothing to choose from")
    if is_embedded(inputs.input_ids):
        raise NotImplementedError(
            f"a {request.decision.kind} takes a plan by the ids of the first prompt, and this one "
            "is given by inputs_embeds; pass ids, or a cache of adaskip.new_cache(plan=...)"
        )
    chosen = request.decision.choose(graphs.model, inputs.input_ids, inputs.attention_mask)
    if chosen not in request.decision.plans:
        kind, digest = request.decision.kind, chosen.digest[:8]
        raise PlanError(f"a {kind} chose plan {digest}, which is none of its plans")
    begun = request.new_request(chosen)
    cache.keep(graphs.stored(chosen), graphs.retention(begun.plans))
    begun.since = request.since
    return begun


def check_length(graphs: Graphs, total: int) -> None:
    """Refuse a text of `total` tokens where that is more than the model has a table of.

    Where positions are a formula, a text that is longer than the config says is warned of, once.

    Raises:
        ValueError: It is.
    """
    trained = graphs.trained_length
    if trained is None or total <= trained:
        return
    name = type(graphs.model).__name__
    if graphs.max_length is not None:
        raise ValueError(
            f"this would make a sequence of {total} tokens, but {name} has positions for {trained} "
            "(max_position_embeddings), in a table; shorten it"
        )
    if graphs not in _said:
        _said.add(graphs)
        logger.warning(
            "a sequence of %d tokens, but %s is made for %d (max_position_embeddings); its "
            "positions go on, what it says may not make sense",
            total,
            name,
            trained,
        )


def longest_row(inputs: Inputs, cache: SkipCache) -> int:
    """Return how many positions the longest row has after a step.

    Padding on the left has none where positions are given; else it is counted like any token.
    """
    given = inputs.padding is not None and inputs.position_ids is not None
    padding = min(inputs.padding.counts) if given and inputs.padding is not None else 0
    return cache.length + inputs.input_ids.shape[1] - padding
