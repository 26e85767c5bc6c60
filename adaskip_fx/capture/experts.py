"""Experts as they are lowered while capturing: of a few tokens in one operator.

transformers' implementations of experts copy the weights that were chosen (``batched_mm``), or sort
tokens by expert (``grouped_mm``). Captured under the name ``adaskip``, a step of a few tokens calls
:func:`run_experts`, which reads the chosen weights where they are. Prompts run ``grouped_mm``, on
CUDA with operators of ours beside the products. Experts that these do not know run as transformers
has them: those with another gate than SwiGLU or GPT-OSS's, a norm of their own, or weights that are
no plain parameters (quantized, adapted or shared among devices).

Importing this module adds the one name to transformers' registry; no config is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from adaskip_passes.decode.expert_ops import MAX_TOKENS, run_experts
from adaskip_passes.grouped_experts.ops import gate_grouped, gather_grouped, sum_grouped

from ..utils.expert_internals import experts_gate, grouped_product, has_plain_experts
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
    given, gate = (hidden_states, top_k_index, top_k_weights), experts_gate(module)
    if gate is not None and _fits(module, hidden_states):
        if statically_known_true(hidden_states.shape[0] <= MAX_TOKENS):
            return _few(module, *given, gate)
        if has_kernels(hidden_states):
            return sorted_by_expert(module, *given, gate)
    result: torch.Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *given)
    return result


def has_kernels(hidden: torch.Tensor) -> bool:
    """Return whether the operators of many tokens are faster than what is made of plain torch."""
    return hidden.is_cuda


def _few(
    module: Any,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate: tuple[float, float],
) -> torch.Tensor:
    """Return what `experts` does, of a few tokens: one operator."""
    weights = module.gate_up_proj, module.down_proj
    how = module.is_transposed, not module.is_concatenated
    output: torch.Tensor = run_experts(
        hidden, chosen, shares, *weights, *_biases(module), *how, *gate, None
    )
    return output


def _biases(module: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)


def sorted_by_expert(
    module: Any,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate: tuple[float, float],
) -> torch.Tensor:
    """Return what `experts` does, of many tokens: transformers' grouped products, our operators.

    Args:
        module: experts with weights that `run_experts` knows.
        hidden: [T, H].
        chosen: [T, k].
        shares: [T, k].
        gate: clamp and alpha of their gate.
    """
    (tokens, count), number = chosen.shape, module.num_experts
    numbers = chosen.reshape(-1).to(torch.int16 if number < 2**15 else torch.int64)
    numbers, order = torch.sort(numbers)  # of short numbers it takes a fraction of the time
    counted = numbers.int() if numbers.is_cuda else numbers.float()  # as each knows it
    ends = torch.histc(counted, bins=number, min=0, max=number - 1).cumsum(0, dtype=torch.int32)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    up_bias, down_bias = _biases(module)
    rows, how = gather_grouped(hidden, order, count), module.is_transposed
    both = grouped_product(rows, module.gate_up_proj, ends, how)
    rows = gate_grouped(both, up_bias, numbers, not module.is_concatenated, *gate)
    outputs = grouped_product(rows, module.down_proj, ends, how)
    places = places.view(tokens, count)
    result: torch.Tensor = sum_grouped(outputs, places, chosen, shares, down_bias)
    return result


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
