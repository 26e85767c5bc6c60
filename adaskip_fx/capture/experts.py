"""Experts as they are lowered while capturing: of a few tokens in one operator.

transformers' implementations of experts copy the weights that were chosen (``batched_mm``), or sort
tokens by expert (``grouped_mm``). Captured under the name ``adaskip``, a step of a few tokens calls
:func:`run_experts`, which reads the chosen weights where they are. Everything else runs
``grouped_mm``: prompts, and experts that the operator does not know, because they have another gate
than SwiGLU or GPT-OSS's, a norm of their own, or weights that are no plain parameters (quantized,
adapted or shared among devices).

Importing this module adds the one name to transformers' registry; no config is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adaskip_passes.decode.expert_ops import MAX_TOKENS, run_experts

from ..utils.expert_internals import experts_gate, has_plain_experts
from ..utils.torch_internals import statically_known_true
from ..utils.transformers_types import CausalLM

NAME = "adaskip"

#: transformers' own implementations that are exchanged; they compute the same, to rounding.
_EXCHANGED = ("eager", "batched_mm", "grouped_mm")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return what the experts of each token give, [T, H], weighted and summed.

    Args:
        module: experts as transformers has them, with all of their weights in two tensors.
        hidden_states: [T, H].
        top_k_index: which experts a token goes through, int64 [T, k].
        top_k_weights: what each of them counts, [T, k].
    """
    gate = experts_gate(module)
    few = statically_known_true(hidden_states.shape[0] <= MAX_TOKENS)
    if not few or gate is None or not _fits(module, hidden_states):
        grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        result: torch.Tensor = grouped(module, hidden_states, top_k_index, top_k_weights)
        return result
    output: torch.Tensor = run_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        module.gate_up_proj,
        module.down_proj,
        module.gate_up_proj_bias if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        module.is_transposed,
        not module.is_concatenated,
        *gate,
        None,
    )
    return output


def _fits(module: Any, hidden: torch.Tensor) -> bool:
    """Return whether the operator knows such weights."""
    if not has_plain_experts(module):
        return False
    weights = module.gate_up_proj, module.down_proj
    return all(
        type(w) is nn.Parameter
        and w.dtype == hidden.dtype
        and w.dtype in _DTYPES
        and w.is_contiguous()
        for w in weights
    )


def exchange(model: CausalLM) -> None:
    """Have a model's experts be ours where they are transformers' own.

    Others are traced as they are, since what they compute is not known.
    """
    names = model.get_experts_implementation()
    if any(name in _EXCHANGED for name in names.values()):
        ours = {part: NAME if n in _EXCHANGED else n for part, n in names.items()}
        model.set_experts_implementation(ours)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
