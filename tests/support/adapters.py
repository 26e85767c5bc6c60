"""Tiny Llamas with adapters of peft's, and what their tests compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version

from adaskip_fx.kv_cache.argument_names import cache_argument
from tests.support.families.all import tiny_config, tiny_model

TARGETS = ["q_proj", "down_proj"]
IDS = torch.arange(1, 12).unsqueeze(0)


def llama(**changes: Any) -> Any:
    """A decoder with two layers and fixed weights."""
    return tiny_model(tiny_config("llama", **{"num_hidden_layers": 2, **changes}))


def drawn(model: Any, seed: int = 3) -> Any:
    """The same model, whose adapters have random weights and no dropout."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt" in name:
                parameter.uniform_(-0.3, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


def lora(**settings: Any) -> Any:
    """A configuration of LoRA."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        **{"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    )


def adapted(*configs: Any, model: Any = None) -> Any:
    """A model of peft's with adapters "first", which is on, and "second"; LoRA if not said."""
    peft = pytest.importorskip("peft")
    first, *others = configs or (lora(), lora())
    made = peft.get_peft_model(model if model is not None else llama(), first, "first")
    for config in others:
        made.add_adapter("second", config)
    made.set_adapter("first")
    return drawn(made)


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    """Logits of a prompt's last token, [B, 1, V], whose graph `build` captures."""
    found: torch.Tensor = model(**{"input_ids": IDS, "logits_to_keep": 1, **inputs}).logits
    return found


@torch.no_grad()
def generated(model: Any, **inputs: Any) -> list[list[int]]:
    """Tokens of a greedy search."""
    given = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found: list[list[int]] = model.generate(**{**given, **inputs}).tolist()
    return found


def assert_same(compiled: Any, eager: Any) -> None:
    """Both give the same logits."""
    torch.testing.assert_close(logits(compiled), logits(eager), rtol=1e-4, atol=1e-5)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits are others, by more than any rounding."""
    return bool((one - other).abs().max() > 1e-2 * other.abs().max())


def peft_knows_the_cache(model: Any) -> bool:
    """Whether peft's `generate` with learned prompts is right: it names the cache since 0.22."""
    import peft

    old = Version(peft.__version__) < Version("0.22")
    return not (old and cache_argument(type(model.get_base_model()).forward) == "cache")
