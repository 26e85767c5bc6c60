"""Compile the kernels of a piece's own operators in threads, while Inductor compiles the rest.

Triton would compile each at its first launch, one after the other; most of that time is spent
outside of Python.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import fx

from . import expert_ops as expert_ops

_WORKERS = 8
_pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="adaskip-triton")

_PROJECT, _ATTEND = torch.ops.adaskip.project.default, torch.ops.adaskip.attend.default
_NORMALIZE = torch.ops.adaskip.normalize.default
_RUN_EXPERTS = torch.ops.adaskip.run_experts.default
_CHOOSE_EXPERTS = torch.ops.adaskip.choose_experts.default
_STORE_AND_ATTEND = torch.ops.adaskip.store_and_attend.default
_LATENT = torch.ops.adaskip.attend_latent.default
_STORE_LATENT = torch.ops.adaskip.store_and_attend_latent.default


def compile_ahead(module: fx.GraphModule) -> list[Future[None]]:
    """Begin to compile the kernels of a piece's own operators; nothing without a GPU.

    Args:
        module: a piece whose nodes carry their example values.

    Returns:
        What to wait for before the piece runs.
    """
    attention = (_ATTEND, _STORE_AND_ATTEND, _LATENT, _STORE_LATENT)
    ours = (_PROJECT, _NORMALIZE, _RUN_EXPERTS, _CHOOSE_EXPERTS, *attention)
    calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target in ours]
    return [future for node in calls for future in _begin(node)]


def _begin(node: fx.Node) -> list[Future[None]]:
    if node.kwargs or any("example_value" not in n.meta for n in node.all_input_nodes):
        return []
    values: Any = fx.map_arg(node.args, lambda n: n.meta["example_value"])
    first = values[0]
    if first.device.type != "cuda":
        return []
    from . import triton_kernels

    if node.target is _PROJECT:
        calls = [triton_kernels.projection(*values)]
    elif node.target is _NORMALIZE:
        calls = [triton_kernels.normalization(*values)]
    elif node.target is _CHOOSE_EXPERTS:
        calls = [triton_kernels.choice(*values)]
    elif node.target is _RUN_EXPERTS:
        calls = triton_kernels.expert_launches(*values)
    else:
        counters = first.new_empty(1, dtype=torch.int32)
        if node.target in (_ATTEND, _LATENT):
            values = (*values[:3], None, None, None, None, *values[3:])
        elif node.target is _STORE_LATENT:
            values = (*values[:5], None, None, *values[5:])
        latent = node.target in (_LATENT, _STORE_LATENT)
        calls = triton_kernels.attention(*(*values, counters), latent=latent)
    return [_pool.submit(call.compile, first.device) for call in calls]
