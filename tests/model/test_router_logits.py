"""Router logits and the auxiliary loss: the eager model's, without the layers that are skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from adaskip_fx import SkipPlan
from adaskip_fx.model import router_logits
from tests.support.compiled_families import compiled_family
from tests.support.compiled_llamas import entry
from tests.support.eager_reference import assert_close

IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 9, dtype=torch.int64)
LEFT[0, :3] = 0
CASES: dict[str, dict[str, Any]] = {
    "a prompt": {},
    "labels": {"labels": IDS},
    "the last token's logits": {"logits_to_keep": 1},
    "padded": {"attention_mask": LEFT},
    "a tuple": {"return_dict": False},
}


@torch.no_grad()
def check(compiled: Any, eager: Any, layers: tuple[int, ...], **given: Any) -> None:
    given = {"input_ids": IDS, "output_router_logits": True, "use_cache": False, **given}
    got, want = compiled(**given), eager(**given)
    if given.get("return_dict") is False:
        assert len(got) == len(want)
        assert_close(got[0], want[0], 1e-5, "the auxiliary loss")
        return
    assert type(got) is type(want)
    assert len(got.router_logits) == len(layers)
    mask = given.get("attention_mask", torch.ones_like(IDS)).bool()
    for layer, one in zip(layers, got.router_logits, strict=True):
        real = mask.flatten()
        assert_close(one[real], want.router_logits[layer][real], 1e-5, f"routers of {layer}")
    if len(layers) == len(want.router_logits):
        assert_close(got.aux_loss, want.aux_loss, 1e-5, "the auxiliary loss")
        if want.loss is not None:
            assert_close(got.loss, want.loss, 1e-5, "loss")
    shown = mask[:, -want.logits.shape[1] :]
    assert_close(got.logits[shown], want.logits[shown], 1e-5, "logits")


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_models_own(case: str) -> None:
    model, compiled = compiled_family("mixtral")
    check(compiled, model, tuple(range(model.config.num_hidden_layers)), **CASES[case])


@pytest.mark.slow
def test_another_family() -> None:
    model, compiled = compiled_family("qwen3_moe")
    routed = model(IDS, output_router_logits=True).router_logits
    check(compiled, model, tuple(range(len(routed))))


def without_ffn(model: Any, layer: int) -> Any:
    """The eager model with an FFN that adds nothing; its router is still called."""
    twin = copy.deepcopy(model)
    mlp = twin.model.layers[layer].mlp
    mlp.register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    return twin


def test_what_is_skipped_is_left_out() -> None:
    model, compiled = compiled_family("mixtral")
    before, layers = compiled.adaskip.plan, range(model.config.num_hidden_layers)
    compiled.adaskip.plan = SkipPlan.of(before.sublayers, ["0.ffn"])
    try:
        rest = tuple(layers)[1:]
        check(compiled, without_ffn(model, 0), rest)
        with pytest.raises(AssertionError, match="relative error"):  # the companion
            check(compiled, model, rest)
    finally:
        compiled.adaskip.plan = before


def test_a_decode_step_on_a_cache() -> None:
    model, compiled = compiled_family("mixtral")
    found = []
    with torch.no_grad():
        for one in (compiled, model):
            output = one(IDS, output_router_logits=True)
            cache = next(v for v in output.values() if hasattr(v, "get_seq_length"))
            name = next(k for k, v in output.items() if v is cache)
            step = {"input_ids": IDS[:, :1], "output_router_logits": True, name: cache}
            found.append(one(**step))
    got, want = found
    assert_close(got.router_logits[0], want.router_logits[0], 1e-5, "routers of 0")
    assert_close(got.logits, want.logits, 1e-5, "logits")


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = entry("grouped")
    with bank.using(), pytest.raises(NotImplementedError, match="LlamaForCausalLM has no router"):
        bank.compiled(IDS, output_router_logits=True)
    _, compiled = compiled_family("mixtral")
    with pytest.raises(NotImplementedError, match="with hidden states, is not supported"):
        compiled(IDS, output_router_logits=True, output_hidden_states=True)
    monkeypatch.setattr(router_logits, "_proven", {})
    monkeypatch.setattr(router_logits, "_is_same", lambda *given: False)
    with pytest.raises(NotImplementedError, match="or others than one value of each FFN"):
        compiled(IDS, output_router_logits=True)
