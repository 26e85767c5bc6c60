"""Recorded steps of whole models whose norms, activations and rotations are written otherwise."""

from __future__ import annotations

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.testing.families import tiny_model
from tests.support.eager_reference import relative_error
from tests.support.families.all import tiny_config
from tests.support.on_gpu import TOLERANCE

DENSE = ("cohere", "glm4", "phi", "granite", "starcoder2", "ernie4_5")
#: With experts, of which rounding may choose others.
SPARSE = ("deepseek_v2", "deepseek_v3")
CASES = (
    *((name, 1, torch.float32) for name in (*DENSE, *SPARSE)),
    *((name, 3, torch.bfloat16) for name in DENSE),
)


@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:\\nOnline softmax is disabled")
@pytest.mark.filterwarnings("ignore:\\s*Torchinductor does not support code generation for complex")
@pytest.mark.parametrize(("name", "rows", "dtype"), CASES, ids=str)
def test_steps_of_a_model(name: str, rows: int, dtype: torch.dtype) -> None:
    """After a prompt; of several rows in half precision, which projections are fused of."""
    model = tiny_model(tiny_config(name)).to("cuda", dtype)
    fast = build(model, None, backend="inductor")
    ids = torch.randint(0, 50, (rows, 14), device="cuda")
    expected = model(input_ids=ids, use_cache=False).logits
    cache = fast.adaskip.new_cache()
    fast(input_ids=ids[:, :8], past_key_values=cache)
    for t in range(8, 14):
        got = fast(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
        assert relative_error(got[:, -1], expected[:, t]) < TOLERANCE[dtype]
