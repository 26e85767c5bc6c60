"""What another rounding may do to logits is allowed to a captured graph, and no more."""

from __future__ import annotations

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.capture import rounding
from adaskip_fx.capture.reference import run_reference
from adaskip_fx.capture.rounding import OtherRounding, allowed_by_rounding
from adaskip_fx.capture.traced_part import decoder_name, traced_forward
from adaskip_fx.model.handle import runtime_of
from adaskip_passes import UnsupportedError
from tests.support.families.all import tiny_config, tiny_model

from .test_reference import be_wrong


def test_products_move_by_their_last_bit() -> None:
    a, b = torch.randn(9, 40).bfloat16(), torch.randn(40, 30).bfloat16()
    right = a @ b
    with OtherRounding(0):
        got, again, wide, sum_ = a @ b, torch.mm(a, b), a.float() @ b.float(), right + 1
    assert torch.equal(wide, a.float() @ b.float())
    assert torch.equal(sum_, right + 1)
    assert not torch.equal(got, right)
    assert not torch.equal(got, again)
    moved = (got.float() - right.float()).abs()
    assert (moved <= 1.5 * torch.finfo(torch.bfloat16).eps * right.float().abs()).all()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_allowed_is_more_than_the_model_s_own_rounding(family: str) -> None:
    model = tiny_model(tiny_config(family)).bfloat16()
    forward = traced_forward(model, decoder_name(model))
    reference = run_reference(model, forward)
    allowed = allowed_by_rounding(reference, model, forward)
    with torch.inference_mode():  # where operators come in other pieces
        assert allowed_by_rounding(reference, model, forward) == pytest.approx(allowed, rel=0.5)
    ids = torch.arange(3, 8).unsqueeze(0)
    with torch.no_grad():
        half, single = model(ids).logits.float(), model.float()(ids).logits
    own = float((half - single).abs().max() / single.abs().max())
    assert 0.5 * own < allowed < 0.2
    reference = run_reference(model, forward)
    assert allowed_by_rounding(reference, model, forward) == 0.0  # in float32


def test_a_model_whose_last_bits_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that rounding moves far, which is made up; beyond 0.7 nothing is a matter of rounding."""
    model = tiny_model(tiny_config("llama")).bfloat16()
    be_wrong(monkeypatch, 0.4)
    with pytest.raises(UnsupportedError, match="gives other logits"):
        build(model, None, backend="eager")
    monkeypatch.setattr(rounding, "_TIMES", 1e4)
    compiled = build(model, None, backend="eager")
    assert runtime_of(compiled).graphs.states.current.reference.tolerance == 0.7
    be_wrong(monkeypatch, 5.0)
    with pytest.raises(UnsupportedError, match="gives other logits"):
        build(model, None, backend="eager")
