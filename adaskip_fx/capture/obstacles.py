"""What a model is made of besides plain layers, named where it cannot be captured.

Whether torch.compile traces a quantized layer or an adapter depends on the versions of both, so
none is refused beforehand; where a capture fails, the message says what is likely in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from adaskip_passes import UnsupportedError

from ..utils.peft_layers import is_adapter
from .state import ChangedError

#: Libraries and parts of transformers whose linear layers hold quantized weights.
_QUANTIZED = frozenset(
    {
        *("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "eetq", "aqlm", "vptq"),
        *("compressed_tensors", "auto_round", "spqr_quant", "optimum", "transformers.integrations"),
    }
)


@contextmanager
def named_obstacles(model: nn.Module) -> Iterator[None]:
    """Say in an error from within what of the model is likely in the way of a capture.

    Raises:
        UnsupportedError: what was raised, with more words.
    """
    try:
        yield
    except ChangedError:
        raise
    except UnsupportedError as error:
        words = " ".join((*_of_quantized(model), *_of_adapters(model)))
        if not words:
            raise
        raise UnsupportedError(f"{error} {words}") from error


def _of_quantized(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        library = _library(type(module).__module__)
        if library is not None:
            yield (
                f"{path} is a {type(module).__name__} of {library}, quantized weights that may be "
                "in the way: load the model without, or with torchao's int8 weights "
                "(Int8WeightOnlyConfig), which can be captured; or call the original model."
            )
            return


def _library(module: str) -> str | None:
    """Return which of the libraries with quantized layers a module of Python is of."""
    names = module.partition(".")[0], ".".join(module.split(".")[:2])
    return next((name for name in names if name in _QUANTIZED), None)


def _of_adapters(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        on = getattr(module, "merged_adapters", None) == [] and not _is_off(module)
        if is_adapter(type(module)) and on:
            variants = getattr(module, "lora_variant", None) or {}
            kinds = ", ".join(sorted({type(v).__name__ for v in variants.values()}))
            yield (
                f"{path} has adapters of peft's{f' ({kinds})' if kinds else ''}, which may be in "
                "the way: merge_adapter() on the original model, before or after it is compiled, "
                "leaves plain layers."
            )
            return


def _is_off(module: Any) -> bool:
    return bool(getattr(module, "disable_adapters", False))
