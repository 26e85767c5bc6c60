"""The parts of transformers that it does not promise, as adaskip_fx uses them.

No other module of adaskip_fx names one, but `expert_internals` those of experts, and
`generation_internals` those of ``generate``; `docs/explanation/private-interfaces.md` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Attributes that each of two copies of a model has for itself: attention and experts of its
#: config, what gradient checkpointing put on a module, and whether it has the hooks of
#: `only_records`.
COPIED_APART = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_gradient_checkpointing_func",
    "_output_capturing_hooks_installed",
)

#: Attributes of a model that say which adapters of peft's it has.
ADAPTERS = ("peft_config", "_hf_peft_config_loaded")

#: Where Qwen's models of images keep how far the positions of what follows are behind, [B, 1].
OFFSETS = "rope_deltas"

#: What accelerate puts on a module besides its forward: a hook, and the forward that it stands for.
ACCELERATE_HOOK, FORWARD_BEFORE = "_hf_hook", "_old_forward"


def attention_name(model: Any) -> str | None:
    """Return the name of a model's attention implementation."""
    name: str | None = model.config._attn_implementation
    return name


def set_attention(model: Any, name: str | None) -> None:
    """Have a model use an attention implementation; what is beside its decoder keeps its own.

    (A tower that looks at images attends in both directions.)
    """
    kept = [(config, config._attn_implementation) for config in _configs_beside(model)]
    model.set_attn_implementation(name)
    for config, before in kept:
        config._attn_implementation = before


def _configs_beside(model: Any) -> list[Any]:
    """Return the configs of the models that are beside a model's decoder."""
    text = model.config.get_text_config()
    if text is model.config:
        return []
    decoder = model.get_decoder()
    within = set(decoder.modules())
    above = {m for m in model.modules() if decoder in set(m.modules())}
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for module in within | above:
        found.pop(id(getattr(module, "config", None)), None)
    for part in getattr(model.config, "sub_configs", {}):
        config = getattr(model.config, part, None)
        if config is not None and config is not text:
            found[id(config)] = config
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


@contextmanager
def on_attention(model: Any, name: str) -> Iterator[None]:
    """Meanwhile a model's attention is transformers' of a name, if it asks the registry for it."""
    before = attention_name(model)
    if before in (None, name) or not can_set_attention(model):
        yield
        return
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, before)


def attends_by_itself(model: Any) -> bool:
    """Return whether a model's attention has soft caps or sinks, which PyTorch's has not."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return capped or not getattr(type(model), "_supports_sdpa", True)


def can_set_attention(model: Any) -> bool:
    """Return whether a model asks the registry for its attention; a user's own may not."""
    return bool(type(model)._can_set_attn_implementation())


def only_records(hook: object) -> bool:
    """Return whether a hook is one that a module gets when it is first asked for hidden states.

    (A tower that looks at images is asked at the first image.) Those are never taken off, and do
    nothing in a call that asks for none.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def keeps_offsets(model: Any) -> bool:
    """Return whether a model keeps on itself how far positions are behind after an image."""
    return any(OFFSETS in vars(module) for module in model.modules())
