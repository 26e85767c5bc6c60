"""Models that do something unusual with their stream, layers or weights: exact, or refused.

Each is compared with its own eager run; what is refused says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from adaskip_fx.api import build, compile
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.testing import assert_equivalent
from adaskip_fx.testing.equivalence import compiled_for
from adaskip_passes import UnsupportedError
from tests.model_support import matrix
from tests.support.custom_decoders import (
    DeepSupervision,
    EarlyExit,
    FeedsTwoLayers,
    SharedLayer,
    own,
)
from tests.support.families.all import tiny_config, tiny_model


def llama(**changes: Any) -> Any:
    return tiny_model(tiny_config("llama", **changes))


def plan_of(model: Any, *names: str) -> SkipPlan:
    sublayers = compiled_for(model).adaskip.sublayers
    chosen = [s for s in sublayers if str(s) in names]
    assert len(chosen) == len(names)
    return SkipPlan.of(sublayers, chosen)


def with_hook() -> Any:
    """A hook of the user's that changes what a sublayer gives."""
    model = llama()
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def with_input_hook() -> Any:
    model = llama()
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.5},
        ),
        with_kwargs=True,
    )
    return model


class LowRank(nn.Module):
    """A LoRA adapter, as libraries put them in place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.into = nn.Linear(base.in_features, 3, bias=False)
        self.back = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x) + 0.5 * self.back(self.into(x))
        return result


def with_adapters() -> Any:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.mlp.down_proj = LowRank(layer.mlp.down_proj)
    return model.requires_grad_(False)


def with_peft() -> Any:
    peft = pytest.importorskip("peft")
    model = llama()
    targets = ["q_proj", "down_proj"]
    try:
        model.add_adapter(peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    except ValueError as error:  # transformers 5.24 wants peft 0.22
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model.eval().requires_grad_(False)


def with_checkpointing() -> Any:
    model = llama()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since 5.23
    (enable or model.gradient_checkpointing_enable)()
    return model


def with_tied_layers() -> Any:
    """One weight in two layers."""
    model = llama()
    first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
    last.down_proj.weight = first.down_proj.weight
    return model


def with_a_shared_ffn() -> Any:
    """One module in two layers."""
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def with_a_tied_head() -> Any:
    return llama(tie_word_embeddings=True)


EXACT: dict[str, Callable[[], Any]] = {
    "a hook": with_hook,
    "a hook on inputs": with_input_hook,
    "adapters by hand": with_adapters,
    "adapters by peft": with_peft,
    "one weight in two layers": with_tied_layers,
    "one FFN in two layers": with_a_shared_ffn,
    "a tied head": with_a_tied_head,
    "deep supervision": lambda: own(DeepSupervision),
    "an early exit": lambda: own(EarlyExit),
}


#: those that `make test` leaves to `make test-all`: near relatives of others
EXACT_IN_ALL = {
    *("a hook on inputs", "adapters by peft", "one weight in two layers", "a tied head"),
    *("deep supervision", "one FFN in two layers", "a hook", "an early exit"),
}


@functools.cache
def made(case: str) -> Any:
    """The model of a case, which is compiled once for all tests of it."""
    return EXACT[case]()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of what peft calls
@pytest.mark.parametrize(
    "case", [c if c not in EXACT_IN_ALL else pytest.param(c, marks=pytest.mark.slow) for c in EXACT]
)
def test_exact(case: str) -> None:
    model = made(case)
    errors = [
        assert_equivalent(model, plan_of(model, *names), decode_steps=3)
        for names in ((), ("1.attention",), ("1.ffn",), ("0.attention", "2.ffn"))
    ]
    assert max(errors) < 1e-5


@pytest.mark.slow
def test_gradient_checkpointing() -> None:
    """Nothing is checkpointed where there are no gradients; 2.11 cannot capture its hook."""
    model = with_checkpointing()
    old = matrix.versions().startswith("torch 2.11")
    with pytest.raises(UnsupportedError, match="requires_grad_") if old else nullcontext():
        assert assert_equivalent(model, plan_of(model, "1.ffn"), decode_steps=3) < 1e-5


@pytest.mark.parametrize(
    "case",
    ["a hook", "adapters by hand", pytest.param("deep supervision", marks=pytest.mark.slow)],
)
def test_the_unusual_is_in_the_result(case: str) -> None:
    """The companion: without it, logits are others, so that it was not left out of both."""
    model = made(case)
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        logits = compiled_for(model)(input_ids=ids).logits
        plain = own() if type(model) is DeepSupervision else llama()
        assert not torch.allclose(logits, plain(input_ids=ids).logits, rtol=1e-2)


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_may_be_skipped_beside_a_branch_that_feeds_two_layers() -> None:
    model = own(FeedsTwoLayers)
    for names in ((), ("0.attention",), ("1.ffn", "2.attention")):
        assert_equivalent(model, plan_of(model, *names), decode_steps=3)


def test_a_branch_that_feeds_two_layers_cannot_be_skipped() -> None:
    model = own(FeedsTwoLayers)
    plan = plan_of(model, "0.ffn", "1.attention")
    message = (
        "the plan skips 1.attention, but what is computed there is read by later layers besides "
        "the residual stream. Of FeedsTwoLayers these cannot be skipped: 1.attention; pass a plan "
        "without them"
    )
    with pytest.raises(UnsupportedError) as caught:
        compile(model, None, plan=plan, backend="eager")
    assert str(caught.value) == message
    runtime = runtime_of(compiled_for(model))
    runtime.plan = plan
    with pytest.raises(UnsupportedError) as caught:
        runtime.new_cache()
    assert str(caught.value) == message


@pytest.mark.slow
def test_a_layer_that_runs_twice() -> None:
    """A plan could not say which of the two is meant."""
    with pytest.raises(
        UnsupportedError, match=r"layer 0 has two attention sublayers \(blocks.0.mixing"
    ):
        build(own(SharedLayer), None, backend="eager")


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_a_config_that_asks_for_more_outputs(asked: str) -> None:
    model = llama(attn_implementation="eager")
    setattr(model.config, asked, True)
    with pytest.raises(ValueError, match=f"config says {asked}=True, which a compiled model does"):
        build(model, None, backend="eager")


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_a_call_that_asks_for_more_outputs(asked: str) -> None:
    compiled = compiled_for(made("an early exit"))
    with torch.no_grad(), pytest.raises(NotImplementedError, match=f"forward\\({asked}=...\\) is"):
        compiled(input_ids=torch.arange(5).unsqueeze(0), **{asked: True})
