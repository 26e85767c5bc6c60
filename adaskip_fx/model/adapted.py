"""Models that peft has put around a decoder: the decoder is compiled, and the same put around it.

Adapters that change layers (LoRA and its like) are part of the decoder's modules, and captured with
it. Prompts that were learned (prompt tuning, p-tuning) are put before the text by peft's own
forward, as embeddings.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from torch import nn

from ..capture.state import ChangedError

#: What peft's models ask of the decoder, and keep.
_PREPARE = "prepare_inputs_for_generation"
#: Attributes that say which adapters there are and which is on, and the prompts that were learned.
_CHOICE = ("active_adapter", "peft_config", "prompt_tokens")
_PROMPTS = "prompt_encoder"
#: Kinds of learned prompts that are keys and values.
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


def decoder_in(model: Any) -> Any:
    """Return the decoder that a model of peft's is around; any other model is its own."""
    around = isinstance(model, nn.Module) and hasattr(model, "peft_config")
    return model.get_base_model() if around and hasattr(model, "get_base_model") else model


def put_around(compiled: nn.Module, model: Any) -> Any:
    """Return a model of peft's around a compiled decoder, like `model` around the decoder.

    Args:
        compiled: the compiled decoder.
        model: a model of peft's, whose tensors are shared; any other: `compiled` is returned.
    """
    decoder = decoder_in(model)
    if decoder is model:
        return compiled
    made = copy.deepcopy(model, {**_tensors(model), id(decoder): compiled})
    base = type(model)
    name = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    made.__class__ = type(base.__name__, (CompiledAround, base), name)
    made._adaskip_like = (model,)  # in a tuple, or it would be a module of this one
    made._adaskip_seen = _chosen(model)
    prepare = f"base_model_{_PREPARE}"
    if prepare in vars(made):
        setattr(made, prepare, getattr(made.base_model, _PREPARE))
    return made.eval()


class CompiledAround:
    """What the generated subclass adds to the class of peft's that is around a compiled decoder."""

    base_model: Any
    peft_config: dict[str, Any]
    active_adapter: str
    disable_adapter: Any
    _adaskip_like: tuple[Any, ...]
    _adaskip_seen: tuple[Any, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of peft's class, with the adapters that the original has."""
        with self._follow():
            if self._is_off():
                return self.base_model.forward(*args, **kwargs)
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run the ``generate`` of peft's class, with the adapters that the original has."""
        with self._follow():
            if not self._is_off():
                self._refuse_prefix()
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"{name}= is not supported by adaskip_fx yet: adapters that differ by row or "
                    "token are put on by hooks of one call; set_adapter for all rows, or call the "
                    "original model"
                )
        return super()._enable_peft_forward_hooks(*args, **kwargs)  # type: ignore[misc]

    def _refuse_prefix(self) -> None:
        adapter = self.peft_config.get(self.active_adapter)
        if adapter is not None and adapter.peft_type in _PREFIXES:
            raise NotImplementedError(
                f"generate with {adapter.peft_type.value} is not supported by adaskip_fx yet: "
                "peft exchanges the cache of a request for one of its own that holds what was "
                "learned; call generate of the original model (forward takes it)"
            )

    def _refuse_merging(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "a compiled model shares its weights with the original, so that adapters cannot be "
            "merged in it alone; merge or unmerge those of the original, which it follows"
        )

    merge_adapter = unmerge_adapter = merge_and_unload = _refuse_merging

    def _follow(self) -> AbstractContextManager[None]:
        """Choose what was chosen in the original since the last time, if it was not done here.

        Returns:
            A context in which a learned prompt is off if it is off in the original. (The decoder
            follows by itself: `adaskip_fx.capture.adapters`.)

        Raises:
            ChangedError: another prompt was chosen in both.
        """
        (like,) = self._adaskip_like
        before, now = self._adaskip_seen, _chosen(like)
        if now != before:
            if _chosen(self) == before:
                for name in _CHOICE:
                    if hasattr(like, name):
                        setattr(self, name, copy.copy(getattr(like, name)))
                prompts = like._modules.get(_PROMPTS)
                if prompts is not None:
                    vars(self)["_modules"][_PROMPTS] = copy.deepcopy(prompts, _tensors(prompts))
            elif self._is_learned() and _chosen(self) != now:
                raise ChangedError(
                    "the learned prompt of the original model was changed after another one was "
                    "chosen in the compiled model; do the same to both, undo it, or compile again"
                )
            self._adaskip_seen = now
        return self.disable_adapter() if self._is_off() else nullcontext()

    def _is_off(self) -> bool:
        """Return whether a learned prompt is off in the original and here it would be on."""
        (like,) = self._adaskip_like
        return self._is_learned() and bool(like._adapters_disabled)

    def _is_learned(self) -> bool:
        adapter = self.peft_config.get(self.active_adapter)
        return adapter is not None and bool(adapter.is_prompt_learning)


def _chosen(model: Any) -> tuple[Any, ...]:
    """Return which adapter of a model of peft's is on, which there are, and of what tensors."""
    prompts = model._modules.get(_PROMPTS)
    tensors = tuple(_tensors(prompts)) if prompts is not None else ()
    return model.active_adapter, tuple(model.peft_config), tensors


def _tensors(module: nn.Module) -> dict[int, Any]:
    return {id(t): t for t in (*module.parameters(), *module.buffers())}
