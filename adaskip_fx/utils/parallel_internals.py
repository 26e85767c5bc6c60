"""What transformers does not promise of its tensor parallelism, as adaskip_fx reads it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from adaskip_passes.decode.shared_memory import stop_waiting

#: The modules whose functions transformers installs as forwards; one for experts since 5.21.
_OF_TENSORS = "transformers.distributed.tensor_parallel"
_OF_EXPERTS = "transformers.distributed.expert_parallel"
#: Fields of a model's ``distributed_config`` that spread it in another way, where they are above 1.
_OTHER_WAYS = {
    "pp_size": "pipeline parallelism",
    "fsdp_size": "FSDP",
    "dp_replicate_size": "replicas of FSDP",
    "enable_sequence_parallel": "sequence parallelism",
}
#: Fields of it that say that experts are spread whole.
_OF_EP = ("ep_size", "enable_expert_parallel")

#: On our ``destroy_process_group``: what is called before torch's own.
_RELEASES = "_adaskip_releases"


@dataclass(frozen=True)
class Installed:
    """What a module's forward on the instance does before and after that of its class.

    Attributes:
        style: an object of transformers' with the three steps of it; None where there is nothing to
            do without gradients.
        mesh: the devices that the module is spread over.
        experts: transformers' object that brings tokens to whole experts, where those are spread.
    """

    style: Any
    mesh: Any
    experts: Any = None

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that the module is spread over."""
        return group_of(self.mesh)

    def runs_on_local(self, module: nn.Module) -> bool:
        """Return whether the forward works on a rank's part of the parameters, as of now."""
        return bool(self.style is not None and self.style.should_use_local_tensors(module))


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a ``DTensor``: it has a part of its values on each rank.

    (torch is built without its class where there is no ``torch.distributed``.)
    """
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def group_of(mesh: Any) -> dist.ProcessGroup:
    """Return the processes of a mesh that has one dimension, or one that is called ``tp``."""
    group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return group


def installed(module: nn.Module) -> Installed | None:
    """Return what tensor parallelism has put around a module's forward; None if nothing."""
    forward = vars(module).get("forward")
    if not isinstance(forward, types.FunctionType):
        return None
    if forward.__module__ not in (_OF_TENSORS, _OF_EXPERTS):
        return None
    held = inspect.getclosurevars(forward).nonlocals
    if "implementation" in held and "self" in held:
        return Installed(held["self"], held["implementation"].ep_mesh, held["implementation"])
    if "mesh" in held and "self" in held:
        return Installed(held["self"], held["mesh"])
    return Installed(None, None)  # its closure has what gradients need, and no style


def reinstall(module: nn.Module, was: Installed) -> None:
    """Put the same around the forward of a module's class, for the module itself."""
    del module.forward
    if was.style is None:
        return
    if was.experts is not None:
        meshes = {"ep_mesh": was.mesh, "tp_mesh": was.experts.tp_mesh}
        was.style.install_forward(module, **meshes, ep_implementation="all_reduce")
    elif "source" in inspect.signature(was.style.transform_output_post_forward).parameters:
        module.forward = _summed(module, was)
    else:
        was.style.install_forward(module, was.mesh)


def remove_gradient_sums(module: nn.Module) -> None:
    """Take off a module the hooks that sum its gradients over ranks, as 5.17 has them."""
    for hook, function in list(module._backward_hooks.items()):
        if getattr(function, "__module__", None) == _OF_TENSORS:
            del module._backward_hooks[hook]


def _summed(experts: nn.Module, was: Installed) -> Callable[..., Any]:
    """Return a forward that sums what each rank's part of the experts gives.

    Before 5.21 transformers' own does so only where the parameters are DTensors.
    """
    own, style, mesh, group = experts.forward, was.style, was.mesh, was.group

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = style.transform_inputs_pre_forward(experts, args, kwargs, mesh)
        output = own(*args, **kwargs)
        dist.all_reduce(output, group=group)
        return output

    return forward


def unfollowed_parallelism(model: Any) -> str | None:
    """Return in which way besides tensor parallelism a model is spread over processes, if any.

    Whole experts on ranks are followed where all of them have the same tokens: what each rank's
    experts give is summed, as with parts of experts.
    """
    config = getattr(model.config, "distributed_config", None)
    for field, way in _OTHER_WAYS.items():
        if _set(config, field):
            return way
    found = [f for f in map(installed, model.modules()) if f is not None and f.experts is not None]
    for experts in (f.experts for f in found):
        if type(experts).__name__ not in ("AutoEP", "AllReduceEP"):
            return f"expert parallelism that exchanges tokens ({type(experts).__name__})"
        if not experts.shares_batch or getattr(experts, "megamoe", None) is not None:
            return "expert parallelism of ranks that do not have the same tokens"
    if not found and any(_set(config, field) for field in _OF_EP):
        return "expert parallelism"  # as transformers before 5.21 does it
    return None


def _set(config: Any, field: str) -> bool:
    return int(getattr(config, field, None) or 0) > int(not field.startswith("enable"))


def parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the processes that a model's tensors are spread over; None where it is in one."""
    for module in model.modules():
        found = installed(module)
        if found is not None and found.mesh is not None:
            return found.group
    return None


# Process groups ----------------------------------------------------------------------------------


def store_of_processes(group: Any, members: Sequence[int]) -> Any:
    """Return the store that all processes met in, for one group of `members` of them."""
    module: Any = dist.distributed_c10d
    prefix = f"adaskip_fx/{group.group_name}/{'-'.join(map(str, members))}"
    return module.PrefixStore(prefix, module._get_default_store())


def abort(group: dist.ProcessGroup) -> None:
    """Have whoever waits for a collective of a group on a GPU go on, with an error if over NCCL."""
    stop_waiting(group.group_name)
    if not torch.cuda.is_available():
        return
    with contextlib.suppress(RuntimeError):  # there is no communicator, or no longer
        backend: Any = group._get_backend(torch.device("cuda"))
        if "NCCL" in type(backend).__name__:
            backend.abort()


def before_process_groups_end(release: Callable[[], None]) -> None:
    """Call `release` before ``destroy_process_group`` ends all groups, and before Python ends.

    torch has no hook for that, so the function is put in front of its own, once.
    """
    module: Any = dist.distributed_c10d
    destroy = module.destroy_process_group
    if getattr(destroy, _RELEASES, None) is release:
        return

    @functools.wraps(destroy)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        if group is None or group is dist.group.WORLD:
            release()
        destroy(group)

    setattr(destroy_process_group, _RELEASES, release)
    module.destroy_process_group = dist.destroy_process_group = destroy_process_group
    atexit.register(release)
