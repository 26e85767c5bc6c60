"""One step of a request: the phase and the plan that its new tokens run with, and what it learns.

Most steps are of one kind: a prompt, or a decoded token of each row. Where drafts are verified
(assisted generation), a step is a prompt and decoded tokens after it, or several of these at once.
Each part runs as what it is: a draft is accepted if the plan for decoding would have chosen it, so
that the tokens are those that are decoded one by one. A draft that the model makes itself is a
decode step with a plan of its own, of which the request remembers nothing.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from ..capture.arguments import is_embedded
from ..capture.graph_key import GraphPhase
from ..kv_cache.cache import SkipCache
from ..kv_cache.drafting import Drafting
from ..plans.decisions import Schedule
from ..plans.phase_split import as_decode
from ..plans.skip_plan import SkipPlan
from ..programs.rewrite import plan_phase
from . import turns
from .checking import checks
from .inputs import Inputs
from .request import Request
from .step import take_back

if TYPE_CHECKING:
    from .runtime import Runtime


def run_step(
    runtime: Runtime, inputs: Inputs, cache: SkipCache, keep: int | torch.Tensor
) -> torch.Tensor:
    """Run new tokens of a request; arguments and logits as of `Runtime.step`."""
    kind: GraphPhase
    phase = turns.phase_of(inputs.input_ids, cache)
    drafting: Drafting | None = cache.drafting
    if drafting is None or drafting.ended:
        return _run(runtime, phase, phase == "decode", inputs, cache, keep)
    if drafting.plan is not None:
        one = inputs.input_ids.shape[1] == 1
        kind, plan = ("decode", drafting.plan) if one else ("extend", as_decode(drafting.plan))
        return runtime.runner.run(kind, cache.request, plan, (), inputs, cache, keep)[0]
    new = inputs.input_ids.shape[1]
    prompt = min(max(drafting.prompt - cache.length, 0), new)
    counts = [prompt] if prompt else []
    if not prompt and not isinstance(cache.request.decision, Schedule):
        kind = "decode" if new == 1 else "extend"
        return _run(runtime, kind, True, inputs, cache, keep)
    if isinstance(cache.request.decision, Schedule):  # each token may have a plan of its own
        counts += [1] * (new - prompt)
    elif prompt < new:
        counts.append(new - prompt)
    before, request = cache.length, cache.request
    try:
        parts = list[torch.Tensor]()
        cut = inputs.cut(counts) if len(counts) > 1 else (inputs,)
        for part, wanted in zip(cut, _kept(counts, keep), strict=True):
            decoded = cache.length >= drafting.prompt
            one = decoded and part.input_ids.shape[1] == 1
            kind = "decode" if one else "extend" if cache.length else "prefill"
            logits = _run(runtime, kind, decoded, part, cache, wanted)
            parts.append(logits)
    except BaseException:
        if len(counts) > 1:
            take_back(cache, before)
            cache.request = request
        raise
    logits = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return logits[:, keep] if isinstance(keep, torch.Tensor) else logits[:, -keep:]


def _kept(counts: list[int], keep: int | torch.Tensor) -> list[int]:
    """Return how many last logits each part is to give: at least one, which is cheap; 0 for all."""
    if isinstance(keep, torch.Tensor) or not keep:
        return [0] * len(counts)
    after = [sum(counts[i + 1 :]) for i in range(len(counts))]
    return [max(1, min(keep - more, count)) for more, count in zip(after, counts, strict=True)]


def _run(
    runtime: Runtime,
    phase: GraphPhase,
    decoded: bool,
    inputs: Inputs,
    cache: SkipCache,
    keep: int | torch.Tensor,
) -> torch.Tensor:
    """Run tokens of one kind: a prompt's, or `decoded` ones."""
    graphs, checked = runtime.graphs, checks()
    turns.check_length(graphs, turns.longest_row(inputs, cache))
    since = cache.request.since
    if not cache.length or since is None:  # of a file, or another's cache
        turns.begin(cache, graphs)
    elif not decoded or checked or since.weights_were_written:
        graphs.states.require(since)
    request = turns.next_turn(cache, decoded, runtime.learner)
    if request.undecided:
        request = turns.choose_plan(cache, inputs, graphs)
    plan, statistics = request.plan, None
    if phase == "decode":
        plan, probed = request.plan_at(cache.length), request.decode.probed
        _agree_on_plan(runtime, request, plan)
        logits, statistics = runtime.runner.run(phase, request, plan, probed, inputs, cache, keep)
    elif decoded:  # in a prompt's graph; nothing is measured, since some may be taken back
        plan = as_decode(request.plan_at(cache.length))
        _agree_on_plan(runtime, request, plan)
        logits, _ = runtime.runner.run(phase, request, plan, (), inputs, cache, keep)
    else:
        _agree_on_prompt(runtime, request, inputs, cache)
        logits = runtime.runner.run_prompt(phase, request, inputs, cache, keep)
    cache.request = request  # only now: a step that was refused has changed nothing
    if checked:
        state = request.since.state if request.since is not None else graphs.states.current
        runtime.checker.compare(plan, plan_phase(phase), inputs, cache, state, logits, keep)
    if statistics is not None:
        request.decode.learn(statistics)
    return logits


def _agree_on_prompt(runtime: Runtime, request: Request, inputs: Inputs, cache: SkipCache) -> None:
    """Compare with the other ranks what a prompt is, and the plan that it runs with."""
    if runtime.ranks.alone:
        return
    ids = inputs.input_ids
    given = b"" if is_embedded(ids) else ids.cpu().numpy().tobytes()
    told = hashlib.sha256(given).hexdigest()[:8]
    step = request.plan.digest, cache.length, tuple(ids.shape), told
    runtime.ranks.agree("a prompt and its plan", step)
    request.agreed = request.plan.digest


def _agree_on_plan(runtime: Runtime, request: Request, plan: SkipPlan) -> None:
    """Compare the plan of decoded tokens with the other ranks, where it is another than before."""
    if runtime.ranks.alone or request.agreed == plan.digest:
        return
    runtime.ranks.agree("the plan of decoding", plan.digest)
    request.agreed = plan.digest
