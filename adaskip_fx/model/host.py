"""A model around a decoder: vision and language models, which hand images on as embeddings.

What is captured is the decoder with its language-model head, as of any model. A prompt with images
is first run up to the decoder by the model's own code, eagerly: what reaches the decoder there,
embeddings, a mask and positions, is what the program runs on. Tokens that are decoded come by ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..capture.arguments import by_name
from ..kv_cache.argument_names import CACHE_NAMES
from ..utils.transformers_internals import OFFSETS
from .outputs import image_output, of_images, returned_output
from .stand_in import with_stand_in

if TYPE_CHECKING:
    from .types import CompiledCausalLM

#: Arguments that a decoder's forward has a use for, besides the cache.
_OF_THE_DECODER = frozenset({"inputs_embeds", "attention_mask", "position_ids"})
#: Arguments that mean nothing to it, or are of the call.
_OF_THE_CALL = frozenset(
    {
        *("use_cache", "cache_position", "return_dict", "output_hidden_states", "input_ids"),
        *CACHE_NAMES,
    }
)
#: They say of each token whether it is of an image.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


class _ReachedError(Exception):
    """The decoder was called."""


class Reached(NamedTuple):
    """What reaches a decoder in a model around it.

    Attributes:
        arguments: of the call, as the decoder takes them.
        offsets: how far positions of the request are behind its tokens, as the model keeps it
            (Qwen's ``rope_deltas``); None where they are not.
        of_images: what the model's output has of images besides, by its fields, if any.
    """

    arguments: dict[str, Any]
    offsets: torch.Tensor | None
    of_images: dict[str, Any] | None = None


def through_host(
    model: CompiledCausalLM,
    arguments: dict[str, Any],
    known: frozenset[str],
    offsets: torch.Tensor | None,
) -> Reached:
    """Return a call's arguments as the decoder of a model around it takes them.

    Args:
        model: a compiled model.
        arguments: of the call, by name.
        known: the names of those that every compiled model takes.
        offsets: of the request so far.

    Raises:
        NotImplementedError: the decoder is handed more than embeddings, a mask and positions.
    """
    path = model._adaskip.decoder_path
    arguments = {k: v for k, v in arguments.items() if not _says_nothing(k, v)}
    more = {k: v for k, v in arguments.items() if k not in known and v is not None}
    images = any(v is not False for v in more.values())
    given, apart = arguments.get("position_ids"), _tells_apart(arguments)
    if images or given is None:
        found, after, besides = _reaches(model, path, arguments, offsets, images)
        positions = _without_axes(found.get("position_ids"), apart)
        if not images:
            return Reached({**arguments, "position_ids": positions}, offsets)
        _refuse_more(type(model).__name__, found)
        kept = {k: v for k, v in arguments.items() if k not in more and k != "input_ids"}
        taken = {k: v for k, v in found.items() if k in _OF_THE_DECODER}
        return Reached({**kept, **taken, "position_ids": positions}, after, besides)
    return Reached({**arguments, "position_ids": _without_axes(given, apart)}, offsets)


def recall_offsets(model: Any, path: Sequence[str], offsets: torch.Tensor | None) -> None:
    """Put a request's offsets where the code of a model, whose decoder is at a path, looks."""
    for module in _around(model, path):
        if OFFSETS in vars(module):
            setattr(module, OFFSETS, offsets)


def _offsets(model: nn.Module, path: Sequence[str]) -> torch.Tensor | None:
    found = (vars(module).get(OFFSETS) for module in _around(model, path))
    return next((offsets for offsets in found if offsets is not None), None)


def _around(model: Any, path: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the modules that a decoder is in."""
    yield model
    for name in path[:-1]:
        model = model._modules[name]
        yield model


def _says_nothing(name: str, value: Any) -> bool:
    """Return whether an argument says that there is no image, or that no token is of one."""
    if isinstance(value, dict) and not value:
        return True
    return name in _TOKEN_TYPES and isinstance(value, torch.Tensor) and not bool(value.any())


def _reaches(
    model: CompiledCausalLM,
    path: tuple[str, ...],
    arguments: Mapping[str, Any],
    offsets: torch.Tensor | None,
    images: bool,
) -> Reached:
    """Run a model's own code up to its decoder, with images, or without; `offsets` so far."""
    runtime = model._adaskip
    runtime.graphs.states.look()  # tensors that were replaced on the original are followed
    original = type(runtime.graphs.states.original)
    forward = _at(model, path).forward
    parameters, kind = inspect.signature(forward), returned_output(forward)
    passed = {k: v for k, v in arguments.items() if k != "labels"}

    goes_on = images and image_output(original.forward) is not None
    besides: dict[str, Any] | None = None
    if goes_on:  # behind the decoder, where there is nothing left to do
        passed = {k: v for k, v in passed.items() if k != "logits_to_keep"} | {"return_dict": True}
    seen: list[dict[str, Any]] = []

    def decoder(*args: Any, **kwargs: Any) -> Any:
        seen.append(by_name(parameters, args, kwargs))
        if not goes_on:
            raise _ReachedError
        nothing = seen[0]["inputs_embeds"][:, :0]
        return (kind or BaseModelOutputWithPast)(last_hidden_state=nothing)

    twin = with_stand_in(model, original, path, decoder)
    if arguments.get("position_ids") is None:  # (`generate` makes them, and leaves the offsets)
        recall_offsets(twin, path, offsets)
    try:
        with torch.no_grad():
            output = original.forward(twin, **passed)
        besides = of_images(output)
    except _ReachedError:
        pass
    if not seen:
        raise NotImplementedError(
            f"{original.__name__} does not call its decoder as a module, so images are not "
            "supported by adaskip_fx yet; call the original model"
        )
    _remember(model, twin, path)
    return Reached(seen[0], _offsets(twin, path), besides)


def _refuse_more(name: str, found: Mapping[str, Any]) -> None:
    allowed = _OF_THE_DECODER | _OF_THE_CALL
    more = [k for k, v in found.items() if k not in allowed and v is not None and v is not False]
    if more:
        raise NotImplementedError(
            f"{name} hands its decoder {', '.join(sorted(more))} with images, which is not "
            "supported by adaskip_fx yet; call the original model"
        )
    mask = found.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        raise NotImplementedError(
            f"{name} has a mask of its own for tokens of images, which see one another; that is "
            "not supported by adaskip_fx yet; call the original model"
        )


def _remember(model: Any, twin: Any, path: tuple[str, ...]) -> None:
    """Put what the model's code wrote on itself (Qwen's ``rope_deltas``) where it would be."""
    for name in path[:-1]:
        model, twin = model._modules[name], twin._modules[name]
        for key, value in vars(twin).items():
            if key != "_modules" and vars(model).get(key) is not value:
                setattr(model, key, value)


def _at(model: Any, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        model = model._modules[name]
    found: nn.Module = model
    return found


def _tells_apart(arguments: Mapping[str, Any]) -> bool:
    """Return whether transformers makes masks of positions in a call."""
    return arguments.get("attention_mask") is None and arguments.get("use_cache") is False


def _without_axes(positions: torch.Tensor | None, apart: bool) -> torch.Tensor | None:
    """Return positions [B, T] if those of all axes are the same, else [axes, B, T].

    The first of four axes is the text's own, which only masks are made of.

    Raises:
        NotImplementedError: it tells texts apart, where `apart` says that it may.
    """
    if positions is None or positions.dim() != 3:
        return positions
    if apart and positions.shape[0] == 4 and bool((positions[0].diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "position_ids of four axes whose first one begins again within a row (packed texts) "
            "are not supported by adaskip_fx yet; pass the texts one by one"
        )
    axes = positions[1:] if positions.shape[0] == 4 else positions
    return axes[0] if bool((axes == axes[:1]).all()) else axes
