"""Families of transformers: skipping is what zeroing a module's output does to the eager model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from adaskip_fx.api import build
from adaskip_fx.plan import SkipPlan
from tests.oracle import assert_close

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Family:
    """A kind of decoder, and where its branches are.

    Attributes:
        kind: as transformers calls it.
        layers: the path of its list of layers.
        attention, ffn: names of the modules in a layer.
        more: what else its configuration says.
    """

    kind: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    more: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **{**_SIZES, **self.more})
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            low, high = (-0.3, 0.3) if parameter.dim() > 1 else (0.5, 1.5)
            parameter.uniform_(low, high)
        return model


_GPTJ = {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 256}
FAMILIES = {
    "llama": Family("llama"),
    "gpt_neox": Family("gpt_neox", "gpt_neox.layers", "attention"),
    "gpt_neox, sequential": Family(
        "gpt_neox", "gpt_neox.layers", "attention", more={"use_parallel_residual": False}
    ),
    "phi": Family("phi"),
    "cohere": Family("cohere"),
    "gptj": Family("gptj", "transformer.h", "attn", more=_GPTJ),
    "stablelm, parallel": Family("stablelm", more={"use_parallel_residual": True}),
}
PLANS = ((), ("1.attention",), ("1.ffn",), ("0.attention", "2.ffn"), ("2.attention", "2.ffn"))


@contextmanager
def without(model: Any, family: Family, names: Sequence[str]) -> Iterator[None]:
    """The eager model, with zeros for what the named sublayers add to the stream."""

    def zero(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    handles = []
    for name in names:
        layer, kind = name.split(".")
        path = f"{family.layers}.{layer}.{getattr(family, kind)}"
        handles.append(model.get_submodule(path).register_forward_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def tokens_of(model: Any, cache: Any) -> list[torch.Tensor]:
    """Logits of a prompt of nine tokens and of three more, one by one."""
    ids = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(3))
    logits = [model(input_ids=ids[:, :9], past_key_values=cache).logits]
    for i in range(9, 12):
        logits.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
    return logits


@pytest.mark.parametrize("fixed_addresses", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, fixed_addresses: bool) -> None:
    family = FAMILIES[name]
    model = family.model()
    compiled = build(model, None, backend="eager", fixed_addresses=fixed_addresses)
    runtime = compiled.adaskip
    assert len(runtime.sublayers) == 6
    results = []
    for plan in PLANS:
        skipped = [s for s in runtime.sublayers if str(s) in plan]
        assert len(skipped) == len(plan)
        runtime.plan = SkipPlan.of(runtime.sublayers, skipped)
        cache = runtime.new_cache()
        logits = tokens_of(compiled, cache)
        with without(model, family, plan):
            expected = tokens_of(model, DynamicCache(config=model.config))
        for step, (got, want) in enumerate(zip(logits, expected, strict=True)):
            assert_close(got, want, 2e-5, f"{name}, {plan}, step {step}")
        assert cache.stored == tuple(f"{i}.attention" not in plan for i in range(3))
        results.append(expected[-1])
    assert all(not torch.allclose(results[0], other, rtol=1e-3) for other in results[1:])
