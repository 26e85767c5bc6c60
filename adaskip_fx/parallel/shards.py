"""Modules that transformers' tensor parallelism shards: the compiled model's hold local tensors.

transformers gives such a module a ``forward`` of its own on the instance, a closure over the
module, which swaps its ``DTensor`` parameters for local ones in every call and sums or gathers what
comes out of it over the ranks; also where experts are whole, each on one rank. A copied module has
the closure of the original's. Here it gets its own, made by transformers' code as well, and where
that would run on local tensors the module holds them from the start: views of the same memory. So a
captured graph is that of one process with a rank's widths, and with collectives where the ranks
meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from adaskip_passes import UnsupportedError

from ..utils.parallel_internals import (
    installed,
    is_sharded,
    reinstall,
    remove_gradient_sums,
    unfollowed_parallelism,
)

#: The projection of a layer's keys, with the layer's number.
_KEYS = re.compile(r".*\.(\d+)\.\w+\.k_proj")


def check_shards(model: Any) -> None:
    """Refuse a model that is spread over processes in another way than by tensor parallelism.

    Raises:
        UnsupportedError: it is.
    """
    other = unfollowed_parallelism(model)
    if other is not None:
        raise UnsupportedError(
            f"the model is spread over processes by {other}, which is not followed; load it with "
            "tensor parallelism: DistributedConfig(tp_size=N), with ep_size=N for whole experts"
        )
    for path, module in model.named_modules():
        sharded = [n for n, p in module._parameters.items() if is_sharded(p)]
        if sharded and installed(module) is None:
            raise UnsupportedError(
                f"{path}.{sharded[0]} is a DTensor, and its module's forward is none that "
                "transformers' tensor parallelism installs, which alone is followed"
            )


def localize(compiled: nn.Module) -> None:
    """Have the sharded modules of a copied model hold local tensors and forwards of their own."""
    for module in compiled.modules():
        remove_gradient_sums(module)
        found = installed(module)
        if found is None:
            continue
        with torch.no_grad():
            local = found.runs_on_local(module)
        if local:
            for name, parameter in module._parameters.items():
                if is_sharded(parameter):
                    module._parameters[name] = local_of(parameter)
        reinstall(module, found)


def followed(held: Any, old: Any, new: Any) -> Any:
    """Return what a compiled model is to hold where the original has a tensor in place of another.

    Args:
        held: what it holds; something else than `old`, or a part of it, is its own and stays.
        old: what the original had.
        new: what it has now.
    """
    if held is old:
        return new
    if held is None or not (is_sharded(old) and is_sharded(new)) or is_sharded(held):
        return held
    same = held.data_ptr() == local_of(old).data_ptr()
    return local_of(new) if same else held


@dataclass(frozen=True)
class HeadShare:
    """Which of a layer's K/V heads a rank has: one of as many equal parts, in the heads' order.

    Attributes:
        index: of the part.
        parts: how many there are.
    """

    index: int
    parts: int

    def own(self, heads: Iterable[int], held: int) -> tuple[int, ...]:
        """Return those of a layer's `heads` that are here, as a rank counts the `held` it has."""
        first = self.index * held
        return tuple(head - first for head in heads if first <= head < first + held)


def head_shares(model: nn.Module) -> dict[int, HeadShare]:
    """Return the share of each layer's K/V heads, where its keys have a projection of their own.

    A layer is not there whose parts are not equal, or whose keys are made together with others.
    """
    found = {}
    for path, module in model.named_modules():
        name = _KEYS.fullmatch(path)
        weight = module._parameters.get("weight")
        if name is None or weight is None:
            continue
        if not is_sharded(weight):
            found[int(name[1])] = HeadShare(0, 1)
            continue
        index, parts = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
        rows: Any = weight.to_local().shape[0]
        if rows * parts == weight.shape[0]:
            found[int(name[1])] = HeadShare(index, parts)
    return found


def local_of(parameter: Any) -> nn.Parameter:
    """Return a rank's part of a sharded parameter, in the same memory."""
    with torch.no_grad():
        local: torch.Tensor = parameter.to_local()
    return nn.Parameter(local.detach(), requires_grad=parameter.requires_grad)
