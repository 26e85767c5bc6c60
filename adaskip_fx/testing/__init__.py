"""Property-test skipping on a model of your own.

    from hypothesis import given
    from adaskip_fx.testing import assert_equivalent, plans, prompts

    model = MyDecoder(tiny_config).eval()

    @given(plans(model), prompts(model))
    def test_skipping(plan, prompt):
        assert_equivalent(model, plan, inputs=prompt)

Needs hypothesis for the strategies, and nothing else.
"""

from ..runtime.oracle import Oracle
from .equivalence import assert_equivalent
from .strategies import plans, prompts, tiny_configs

__all__ = ["Oracle", "assert_equivalent", "plans", "prompts", "tiny_configs"]
