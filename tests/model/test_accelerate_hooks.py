"""Models that accelerate put hooks on: those that move nothing are left out, others refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from adaskip_fx.api import build
from tests.support.compiled_llamas import make_model
from tests.support.eager_reference import assert_close

accelerate = pytest.importorskip("accelerate")
IDS = torch.tensor([[5, 9, 3, 22, 8, 17]])


def check(model: Any, want: torch.Tensor) -> None:
    before = [dict(vars(m)) for m in model.modules()]
    compiled: Any = build(model, None, backend="eager")
    with torch.no_grad():
        assert_close(compiled(IDS).logits, want, 1e-5, "logits")
        assert_close(model(IDS).logits, want, 1e-5, "the original's logits")
    assert not any("_hf_hook" in vars(m) for m in compiled.modules())
    assert [dict(vars(m)) for m in model.modules()] == before


def test_hooks_that_move_nothing() -> None:
    model = make_model("one_layer")
    want = model(IDS).logits.detach()
    hooked = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(hooked), "there is something to leave out"
    check(hooked, want)
    accelerate.hooks.remove_hook_from_module(hooked, recurse=True)  # which leaves a forward there
    assert "forward" in vars(hooked)
    check(hooked, want)


@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_hooks_that_load_weights_are_refused() -> None:
    hooked = accelerate.cpu_offload(copy.deepcopy(make_model("one_layer")), torch.device("cpu"))
    with pytest.raises(TypeError, match="has weights on the meta device, where accelerate leaves"):
        build(hooked, None, backend="eager")
    accelerate.hooks.add_hook_to_module(hooked, accelerate.hooks.ModelHook())
    with pytest.raises(TypeError, match=r"on several devices or offloaded.*remove the hook"):
        build(hooked, None, backend="eager")
