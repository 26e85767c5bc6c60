"""Compile the kernels of a piece's own operators in threads, while Inductor compiles the rest.

Triton would compile each at its first launch, one after the other; most of that time is spent
outside of Python.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from .. import _torch
from ..attention.cuda_kernels import knows_tiles
from ..decode import expert_ops as expert_ops
from ..decode import latent_ops as latent_ops
from ..decode import projection_ops as projection_ops
from ..decode import router_ops as router_ops
from ..grouped_experts import ops as ops  # defines its operators

if TYPE_CHECKING:
    from ..infra.launch import Launch

_WORKERS = 8
_FORESEEN = 256  # rows
_pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="adaskip-triton")

_PROJECT, _ATTEND = torch.ops.adaskip.project.default, torch.ops.adaskip.attend.default
_NORMALIZE = torch.ops.adaskip.normalize.default
_RUN_EXPERTS = torch.ops.adaskip.run_experts.default
_CHOOSE_EXPERTS = torch.ops.adaskip.choose_experts.default
_CHOOSE_IN_GROUPS = torch.ops.adaskip.choose_in_groups.default
_STORE_AND_ATTEND = torch.ops.adaskip.store_and_attend.default
_LATENT = torch.ops.adaskip.attend_latent.default
_STORE_LATENT = torch.ops.adaskip.store_and_attend_latent.default
_GATHER, _GATE = torch.ops.adaskip.gather_grouped.default, torch.ops.adaskip.gate_grouped.default
_SUM = torch.ops.adaskip.sum_grouped.default
_CAUSAL = torch.ops.adaskip.attend_causal.default


def compile_ahead(module: fx.GraphModule) -> list[Future[None]]:
    """Begin to compile the kernels of a piece's own operators; nothing without a GPU.

    Args:
        module: a piece whose nodes carry their example values.

    Returns:
        What to wait for before the piece runs.
    """
    attention = (_ATTEND, _STORE_AND_ATTEND, _LATENT, _STORE_LATENT)
    experts = (_RUN_EXPERTS, _CHOOSE_EXPERTS, _CHOOSE_IN_GROUPS)
    grouped = (_GATHER, _GATE, _SUM)
    ours = (_PROJECT, _NORMALIZE, *experts, *grouped, *attention, _CAUSAL)
    calls = [n for n in module.graph.nodes if n.op == "call_function" and n.target in ours]
    return [future for node in calls for future in _begin(node)]


def _begin(node: fx.Node) -> list[Future[None]]:
    if node.kwargs or any("example_value" not in n.meta for n in node.all_input_nodes):
        return []
    values: Any = fx.map_arg(node.args, lambda n: n.meta["example_value"])
    first = values[0]
    if first.device.type != "cuda":
        return []
    if node.target is _CAUSAL:
        calls = _of_prompts(*values)
    else:
        calls = [call for some in _of_rows(values) for call in _launches(node.target, some)]
    distinct = {(call.kernel, *sorted(call.flags.items())): call for call in calls}
    return [_pool.submit(call.compile, first.device) for call in distinct.values()]


def _of_prompts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> list[Launch]:
    """Return launches of a prompt's attention, for any length."""
    if not knows_tiles(query, value):
        return []
    from ..attention.triton_kernels.tiles import causal_of_any_length

    query, key, value = (_torch.fake_of_rows(t, None, 0) for t in (query, key, value))
    return causal_of_any_length(query, key, value, scale)


def _of_rows(values: Any) -> Iterator[Any]:
    """Yield example values for each number of rows that has kernels of its own.

    Kernels depend on rows by the powers of two that hold them. Of rows that may be more than
    `_FORESEEN` the fewest are tried alone.
    """
    rows = next((size for size in values[0].shape[:1] if isinstance(size, torch.SymInt)), None)
    if rows is None:
        yield values
        return
    least, most = _torch.bounds_of(rows)
    if most is None or most > _FORESEEN:
        most = least
    counts = {(n - 1).bit_length(): n for n in range(least, most + 1)}
    for count in counts.values():
        with_rows = functools.partial(_with_rows, rows=rows, count=count)
        yield map_aggregate(values, with_rows)


def _with_rows(value: Any, rows: torch.SymInt, count: int) -> Any:
    is_tensor = isinstance(value, torch.Tensor)
    return _torch.fake_of_rows(value, rows, count) if is_tensor else value


def _launches(target: Any, values: Any) -> list[Launch]:
    from ..decode import triton_kernels

    if target in (_GATHER, _GATE, _SUM):
        return [_of_grouped(target, values)]
    if target is _PROJECT:
        return [triton_kernels.projection(*values)]
    if target is _NORMALIZE:
        return [triton_kernels.normalization(*values)]
    if target is _CHOOSE_EXPERTS:
        return [triton_kernels.choice(*values)]
    if target is _CHOOSE_IN_GROUPS:
        return [triton_kernels.choice_in_groups(*values)]
    if target is _RUN_EXPERTS:
        return triton_kernels.expert_launches(*values)
    if target in (_ATTEND, _LATENT):
        values = (*values[:3], None, None, None, None, *values[3:])
    elif target is _STORE_AND_ATTEND:
        values = (*values[:13], False, *values[13:])  # nothing is put into halves
    elif target is _STORE_LATENT:
        values = (*values[:11], 0, *values[11:])  # all of the rest is rotated
    latent = target in (_LATENT, _STORE_LATENT)
    return triton_kernels.attention(*values, latent=latent)


def _of_grouped(target: Any, values: Any) -> Launch:
    from ..grouped_experts import triton_kernels

    launch: dict[Any, Any] = {
        _GATHER: triton_kernels.gathering,
        _GATE: triton_kernels.gates,
        _SUM: triton_kernels.sums,
    }
    made: Launch = launch[target](*values)
    return made
