"""What a model must be to be compiled: a plain decoder of transformers' in evaluation mode."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..capture.adapters import refuse_unmerging
from ..capture.traced_part import decoder_name
from ..parallel.shards import check_shards
from ..utils.peft_layers import is_adapter
from .accelerate_hooks import is_replaced
from .adapted import decoder_in
from .checked_call import refuse_outputs
from .compiled_model import CompiledModel


def check_model(model: Any) -> Any:
    """Refuse what is not a transformers decoder in evaluation mode, maybe with adapters of peft's.

    Args:
        model: a decoder, or a model of peft's around one.

    Returns:
        The decoder.

    Raises:
        TypeError: it is no decoder of transformers', or a wrapper of one, or it was changed, or
            offloaded.
        ValueError: it is in training mode, or its config asks for outputs that are not captured.
        UnsupportedError: its adapters are merged and disabled, or it is spread over processes in
            another way than by tensor parallelism.
    """
    given, model = model, decoder_in(model)
    _check_kind(given, model)
    refuse_outputs(model)
    if is_replaced(model):
        raise TypeError(
            "the model's forward was replaced on the instance (accelerate hooks do that, where "
            "weights are on several devices or offloaded); load it without device_map, or remove "
            "the hook"
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise TypeError(
            "the model has weights on the meta device, where accelerate leaves those that it "
            "offloads; put all of it on one device"
        )
    if model.training or any(map(_drops, given.modules())):
        raise ValueError("the model is in training mode; call model.eval() first")
    refuse_unmerging(model)
    check_shards(model)
    return model


def _check_kind(given: Any, model: Any) -> None:
    """Refuse a model that is no decoder of transformers', found in what was `given`."""
    if isinstance(model, CompiledModel):
        raise TypeError("this model is compiled already; compile the original with another plan")
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        hint = ""
        if is_adapter(type(given)):
            hint = " (adapters of several kinds: pass the decoder inside, base_model.model)"
        elif hasattr(model, "_orig_mod"):
            hint = " (a torch.compile wrapper: pass the model inside it)"
        raise TypeError(
            f"expected a transformers PreTrainedModel with a language-model head, got {kind}{hint}"
        )
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"{type(model).__name__} is an encoder-decoder model; only decoder-only models are "
            "supported"
        )
    if model.main_input_name != "input_ids":
        raise TypeError(
            f"{type(model).__name__} takes {model.main_input_name}, no text; only decoder-only "
            "models are supported"
        )
    if model.get_output_embeddings() is None and decoder_name(model) is None:
        raise TypeError(
            f"{type(model).__name__} has no language-model head, nor another; load it with "
            "AutoModelForCausalLM, or with the class of the head that it has"
        )


def _drops(module: nn.Module) -> bool:
    """Return whether a module drops values out: peft's layers may be so in a model that is not."""
    return module.training and isinstance(module, nn.Dropout) and module.p > 0
