"""Single values of a sharded tensor, without gathering it: each rank gives those that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from .ranks import Integers, Ranks

_Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def sampled_on_all_ranks(
    tensors: Mapping[str, Any], indices: Callable[[Any], _Indices]
) -> dict[str, Integers]:
    """Return the bits of some values of sharded tensors in float32, the same on all ranks.

    Args:
        tensors: by name, all of one model's.
        indices: gives of a tensor which values, flattened.
    """
    held = {name: held_values(tensor, indices(tensor)) for name, tensor in tensors.items()}
    return Ranks.holding(tensors.values()).sums("the weights", held)


@torch.no_grad()
def held_values(tensor: DTensor, indices: _Indices) -> Integers:
    """Return the bits of values in float32, and zeros where another rank gives them.

    Each value is given by one rank, so that the sum over ranks is the bits of all values.

    Args:
        tensor: sharded along any of its dimensions, or on every rank.
        indices: of the values in the whole tensor, flattened.
    """
    local = tensor.to_local()
    where = list(np.unravel_index(indices, tuple(tensor.shape)))
    held = np.ones(len(indices), dtype=bool)
    coordinates = tensor.device_mesh.get_coordinate()
    for axis, placement in enumerate(tensor.placements):
        if not hasattr(placement, "dim"):  # on every rank
            held &= coordinates is not None and coordinates[axis] == 0
            continue
        dim = placement.dim % tensor.ndim
        local_index = np.full(tensor.shape[dim], -1, dtype=np.int64)
        rows = _rows(tensor, placement, tensor.shape[dim])
        local_index[rows] = np.arange(len(rows))
        where[dim] = local_index[where[dim]]
        held &= where[dim] >= 0
    values = np.zeros(len(indices), dtype="<f4")
    picked = tuple(torch.from_numpy(w[held]).to(local.device) for w in where)
    values[held] = local[picked].float().cpu().numpy()
    return values.view(np.int32)


def _rows(tensor: DTensor, placement: Any, size: int) -> _Indices:
    """Return which rows of a sharded dimension this rank holds, in order."""
    more = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    along = type(placement)(dim=0, **more)
    all_rows = torch.arange(size, device=tensor.to_local().device)
    mine = distribute_tensor(all_rows, tensor.device_mesh, [along], src_data_rank=None)
    return np.asarray(mine.to_local().cpu().numpy())
