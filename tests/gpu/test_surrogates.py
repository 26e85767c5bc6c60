"""The surrogates on a GPU: decode steps as one CUDA graph, against the eager model."""

from __future__ import annotations

import pytest
import torch

from adaskip_fx.plans.skip_plan import Action, SkipPlan
from adaskip_fx.plans.surrogate import SHAPES
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.testing import assert_equivalent
from tests.support.compiled_llamas import entry, make_model
from tests.support.surrogates import surrogate

#: Neighbours that are folded are rounded to bfloat16 once, the two maps of the eager model twice.
_ROUNDED = {torch.float32: None, torch.bfloat16: 0.25}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_rung_on_a_gpu(kind: str, dtype: torch.dtype, backend: str) -> None:
    sublayers = entry("three_layers").sublayers
    skipped = (sublayers[1], sublayers[2], sublayers[5])
    actions = dict.fromkeys(skipped, Action.SKIP)
    drawn = {s: surrogate(kind, i, 32) for i, s in enumerate(skipped)}  # type: ignore[arg-type]
    plan = SkipPlan(sublayers, actions, actions, Surrogates(drawn))
    model = make_model("three_layers", dtype).cuda()
    assert_equivalent(model, plan, backend=backend, decode_steps=6, tol=_ROUNDED[dtype])
