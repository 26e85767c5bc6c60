"""The tensors that forward is called with, as the runtime takes them, or a refusal in words."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..capture.arguments import Forward, takes_logits_to_keep
from ..kv_cache.cache import SkipCache
from ..kv_cache.padding import Answer, Padding
from ..utils.torch_internals import is_transformed

if TYPE_CHECKING:
    from .types import CompiledCausalLM

logger = logging.getLogger(__name__)


def refuse_packed(positions: object) -> None:
    """Refuse positions of several texts in a row, which a model tells apart without a cache."""
    if isinstance(positions, torch.Tensor) and bool((positions.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "position_ids begin again within a row: texts that are packed without padding are not "
            "supported by adaskip_fx yet; pad them, or call the original model"
        )


def refuse_transformed(tensor: torch.Tensor) -> None:
    """Refuse a tensor, of the inputs or the weights, that torch.func has wrapped."""
    if is_transformed(tensor):
        raise NotImplementedError(
            "transforms of torch.func (vmap, grad) are not supported by adaskip_fx yet; a captured "
            "graph cannot be transformed"
        )


def checked_tokens(
    model: CompiledCausalLM, device: torch.device, input_ids: object, embeddings: object
) -> torch.Tensor:
    """Return new tokens where the model is: ids int64 [batch, tokens], or embeddings with an axis.

    Args:
        model: a compiled model.
        device: where it is.
        input_ids: what forward was called with.
        embeddings: its ``inputs_embeds``, in place of ids.
    """
    if embeddings is not None:
        if input_ids is not None:
            raise ValueError("give input_ids or inputs_embeds, not both")
        return _checked_embeddings(model, device, embeddings)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise ValueError("input_ids must be a tensor [batch, tokens]")
    return _checked("input_ids", device, input_ids).to(torch.int64).contiguous()


def _checked(name: str, device: torch.device, tokens: torch.Tensor) -> torch.Tensor:
    if tokens.shape[0] == 0 or tokens.shape[1] == 0:
        raise ValueError(f"{name} is empty: {list(tokens.shape)}")
    refuse_transformed(tokens)
    if tokens.device != device:
        raise ValueError(f"{name} is on {tokens.device}, the model on {device}")
    return tokens


def _checked_embeddings(
    model: CompiledCausalLM, device: torch.device, embeddings: object
) -> torch.Tensor:
    if not isinstance(embeddings, torch.Tensor) or embeddings.dim() != 3:
        raise ValueError("inputs_embeds must be a tensor [batch, tokens, hidden]")
    _checked("inputs_embeds", device, embeddings)
    width = model.get_input_embeddings().weight.shape[1]
    if embeddings.shape[2] != width or embeddings.dtype != model.dtype:
        raise ValueError(
            f"inputs_embeds are {embeddings.shape[2]} wide and {embeddings.dtype}, the model's "
            f"embeddings {width} wide and {model.dtype}"
        )
    return embeddings.detach().contiguous()


def checked_mask(
    mask: object, input_ids: torch.Tensor, cache: SkipCache, ahead: bool
) -> tuple[torch.Tensor | None, Padding | None, Answer | None]:
    """Return the mask [batch, stored + new], or None when nothing is padded, and what it says.

    Models without attention get one of the new tokens alone, as ``generate`` makes it. If a step
    may be begun `ahead`, that is what the last mask said, and the third is whether it is right.
    """
    past = cache.length
    if mask is None:
        return None, None, None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise NotImplementedError(
            "attention_mask must be a tensor [batch, tokens]; prepared 4D masks are not supported"
        )
    expected = (input_ids.shape[0], past + input_ids.shape[1])
    if mask.shape == input_ids.shape[:2] and not any(spec.attends for spec in cache.specs):
        mask = torch.nn.functional.pad(mask, (past, 0), value=1)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected {list(expected)}: "
            f"{past} stored and {input_ids.shape[1]} new tokens"
        )
    mask = mask.to(input_ids.device)
    padding, same = cache.mask.padding(mask, suppose=ahead)
    if padding is None:
        _say_once()
    elif not padding.any:
        return None, None, same
    return mask, padding, same


@functools.cache
def _say_once() -> None:
    logger.warning(
        "rows of this batch are padded on the right, or have holes; they run with a mask, which is "
        "slower than padding on the left"
    )


def checked_positions(
    positions: object, input_ids: torch.Tensor, in_axes: bool = False
) -> torch.Tensor | None:
    """Return the positions of new tokens, [batch, tokens]; None where the caller names none.

    With images there may be an axis more, in front (`adaskip_fx.model.host`).
    """
    if positions is None:
        return None
    most = 3 if in_axes else 2
    if not isinstance(positions, torch.Tensor) or not 2 <= positions.dim() <= most:
        raise NotImplementedError(
            "position_ids must be a tensor [batch, tokens]; more axes are not supported"
        )
    return positions.to(input_ids.device)


def checked_keep(keep: Any, input_ids: torch.Tensor, forward: Forward) -> int | torch.Tensor:
    """Return how many last tokens' logits are wanted, 0 for all; or whose, int64 [K]."""
    tokens, device = input_ids.shape[1], input_ids.device
    if not isinstance(keep, torch.Tensor):
        count = int(keep or 0)  # below zero: without so many of the first, as in the eager model
        return count if count >= 0 else torch.arange(min(-count, tokens), tokens, device=device)
    if not takes_logits_to_keep(forward):
        return 0
    indices: torch.Tensor = keep
    if keep.dim() != 1 or keep.dtype not in (torch.int64, torch.int32, torch.bool):
        raise NotImplementedError(
            "logits_to_keep must be an integer, indices [kept] or a bool mask [tokens], not "
            f"{str(keep.dtype).removeprefix('torch.')} {list(keep.shape)}; call the original model"
        )
    if keep.dtype == torch.bool:
        if keep.shape[0] != tokens:
            raise IndexError(
                f"logits_to_keep is a mask of {keep.shape[0]} token(s), but {tokens} are new"
            )
        indices = keep.nonzero().flatten()
    elif keep.device.type == "cpu" and bool(((keep < -tokens) | (keep >= tokens)).any()):
        raise IndexError(
            f"logits_to_keep names a token beyond the {tokens} new one(s): {keep.tolist()}"
        )
    return indices.to(device, torch.int64)
