"""Make a compiled model: an object of a generated subclass that shares the original's tensors.

The module tree is copied with the parameters and buffers in the copy's memo, so both models use
the same tensors, while configuration, hooks and training flags are each model's own.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from ..capture import attention, experts, rotary
from ..capture.traced_part import decoder_name
from ..parallel.shards import localize
from ..utils.transformers_internals import can_set_attention, set_attention
from .accelerate_hooks import leave_out
from .compiled_model import CompiledModel
from .forward import compiled_forward
from .forward_inputs import following
from .heads import headed_forward


def make_compiled_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of a generated subclass that shares the parameters and buffers of `model`.

    It runs once its ``_adaskip`` is a runtime.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    compiled: PreTrainedModel = copy.deepcopy(model, memo)
    leave_out(compiled)
    vars(compiled).pop("prepare_inputs_for_generation", None)  # peft leaves one there
    base = type(model)
    name = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    headed = decoder_name(model) is not None
    methods = {"forward": (headed_forward if headed else compiled_forward)(base.forward)}
    # looked up now: while anything is traced, in any thread, FX exchanges it for all modules
    methods["__call__"] = base.__call__
    if hasattr(base, "prepare_inputs_for_generation"):
        methods["prepare_inputs_for_generation"] = following(base.prepare_inputs_for_generation)
    compiled.__class__ = type(base.__name__, (CompiledModel, base), {**name, **methods})
    localize(compiled)
    rotary.make_pure(compiled)
    if can_set_attention(compiled) and not attention.is_own(model):
        set_attention(compiled, attention.NAME)
    experts.exchange(compiled)
    return compiled
