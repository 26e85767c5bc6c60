"""Steps of ``generate`` that need of forward's arguments nothing but the tokens.

Between two tokens ``generate`` makes arguments for forward, and forward looks at each of them: on a
GPU a small model's step waits for that. Without padding, and with positions that count on from the
cache, nothing of the arguments changes from one step to the next but the tokens, which are the
request's own. They go to the runtime then.

That holds where the model's class leaves these arguments to transformers, and nothing stands before
its forward: a hook is called at every step, as are methods that a class or a user put in the place
of transformers'.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from transformers.generation import GenerationMixin

from ..kv_cache.cache import SkipCache
from ..runtime.ready_step import ReadyStep, ready_steps
from ..utils.generation_internals import UPDATES, GenerateHooks
from ..utils.torch_internals import nothing_stands_before
from ..utils.transformers_types import ModelKwargs
from .checked_call import check_call

if TYPE_CHECKING:
    from .types import CompiledCausalLM

_PREPARES = "prepare_inputs_for_generation"
#: Arguments that are the same in every step, and say nothing that a step has not.
_THE_SAME = ("use_cache", "logits_to_keep", "return_dict")


def are_possible(model: CompiledCausalLM, model_kwargs: ModelKwargs) -> bool:
    """Return whether the steps of a request may go to the runtime, whose prompt has been read.

    Args:
        model: a compiled model.
        model_kwargs: forward's arguments for its next step.
    """
    runtime = model._adaskip
    given = {name for name, value in model_kwargs.items() if value is not None}
    plain = given <= {runtime.generate_argument, *_THE_SAME}
    return plain and not runtime.decoder_path and is_usual(type(model))


def step(model: CompiledCausalLM, cache: SkipCache, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return the logits of new tokens [B, T, V]; None where forward has to be called.

    Args:
        model: a compiled model.
        cache: the request's.
        tokens: int64 [B, T].
    """
    if not _leads_to_runtime(model):
        return None
    whole = tokens.to(torch.int64).contiguous()
    return model._adaskip.step(whole, None, None, cache, tokens.shape[1])


def ready(model: CompiledCausalLM, cache: SkipCache) -> dict[int, ReadyStep]:
    """Return the steps of drafts that a request may run next; see `ready_steps`."""
    return ready_steps(model._adaskip, cache) if _leads_to_runtime(model) else {}


def _leads_to_runtime(model: CompiledCausalLM) -> bool:
    """Return whether forward would do nothing else now; it is refused as forward refuses it."""
    if not nothing_stands_before(model) or _PREPARES in vars(model):
        return False
    check_call(model, None, goes_on=True)
    return True


def is_usual(kind: type) -> bool:
    """Return whether a compiled model's class makes forward's arguments as most models do."""
    prepares = inspect.unwrap(getattr(kind, _PREPARES, is_usual))
    after_ours = kind.__mro__[kind.__mro__.index(GenerateHooks) + 1 :]
    updates = next((vars(base)[UPDATES] for base in after_ours if UPDATES in vars(base)), None)
    theirs = vars(GenerationMixin)
    return prepares is theirs[_PREPARES] and updates is theirs[UPDATES]
