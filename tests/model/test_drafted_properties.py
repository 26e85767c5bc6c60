"""Whatever drafts, and however the model is built: the eager model's tokens, keys and values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.speculation.lookup import Lookup
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.testing import plans
from tests.support.compiled_llamas import SEEDS, fewer, stored
from tests.support.drafts import Drafting, Oracle, drafting
from tests.support.families.all import tiny_config, tiny_model

NEW = 12


def assert_lossless(bank: Drafting, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """What is generated and stored is what the eager model generates and stores."""
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids) if mask is None else mask}
    given |= {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    given |= {"return_dict_in_generate": True, "eos_token_id": None}
    want, got = (model.generate(ids, **given) for model in (bank.model, bank.fast))
    assert torch.equal(got.sequences, want.sequences)
    assert got.past_key_values.get_seq_length() == ids.shape[1] + NEW - 1
    for pair, layer in zip(stored(got.past_key_values), want.past_key_values.layers, strict=True):
        if pair is not None and mask is None:
            for mine, theirs in zip(pair, (layer.keys, layer.values), strict=True):
                # (transformers forgets what is outside of a model's own windows)
                mine = mine[:, :, -theirs.shape[2] :]
                near = 1e-10 if mine.dtype == torch.float64 else 1e-5
                torch.testing.assert_close(mine, theirs, rtol=near, atol=near)


@fewer(3)
@given(
    st.data(),
    st.integers(2, 20),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["lookup", "skipped", "oracle"]),
    SEEDS,
)
def test_any_plan_any_block_any_prompt(
    data: st.DataObject, prompt: int, longest: int, batch: int, kind: str, seed: int
) -> None:
    bank = drafting("grouped")
    ids = bank.tokens(batch, prompt, seed)
    if kind == "skipped":
        bank.begin(Skipped(data.draw(plans(bank.runtime.sublayers))), longest=longest)
    elif kind == "lookup":
        bank.begin(Lookup(data.draw(st.integers(1, 3))), longest=longest)
    else:
        text = bank.model.generate(
            ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        bank.begin(Oracle(text, wrong=data.draw(st.integers(0, 5))), longest=longest)
    assert_lossless(bank, ids)


#: Other structures: parallel branches, a table of positions, queries that are normalized; and soft
#: caps and windows of the model's own, experts, latents, whose code runs in float32 alone.
FAMILIES = {
    **dict.fromkeys(("gpt_neox", "gpt2", "qwen3"), torch.float64),
    **dict.fromkeys(("gemma2", "mixtral", "deepseek_v3"), torch.float32),
}


@functools.cache
def family(name: str) -> Drafting:
    model = tiny_model(tiny_config(name)).to(FAMILIES[name])
    plain = build(model, None, backend="eager")
    skippable = [s for s in plain.adaskip.sublayers if s.layer > 0]
    plan = SkipPlan.of(plain.adaskip.sublayers, skippable[:1])
    decoding = Lossless((Lookup(), Skipped()), 5, adaptive=False)
    return Drafting(model, build(model, plan, decoding=decoding, backend="eager"), plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_other_structures(name: str) -> None:
    bank = family(name)
    assert_lossless(bank, bank.tokens(1, 9, 2))
    ids, mask = bank.tokens(2, 9, 3), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    assert_lossless(bank, ids, mask)
    speculation = runtime_of(bank.fast).speculation
    assert speculation is not None
    assert speculation.stats.proposers["skipped"].verifications > 3
