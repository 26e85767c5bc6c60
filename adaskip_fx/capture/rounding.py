"""How far a model's logits move when its matrix products are rounded the other way.

In half precision two right computations of the same model differ by what was rounded, and a router
that has to choose between experts that are about equally good turns a last bit into other experts.
How much that is depends on the model: it is measured on the model itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from .check_graph import relative_error

if TYPE_CHECKING:
    from ..utils.transformers_types import CausalLM
    from .arguments import Forward
    from .reference import ReferenceRun

_HALVES = (torch.float16, torch.bfloat16)
#: Functions of torch, by name.
_PRODUCTS = frozenset(
    {
        *("linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "einsum"),
        *("grouped_mm", "_grouped_mm", "scaled_dot_product_attention"),
    }
)
_SEEDS = (0, 1)
#: Logits of a graph may differ by so many times what another rounding of products alone does:
#: norms, gates and the stream are rounded as well.
_TIMES = 3.0
#: Logits that have nothing to do with each other differ by more than their largest.
_MOST = 0.7


class OtherRounding(TorchFunctionMode):
    """Meanwhile results of matrix products in half precision go up or down by a last bit."""

    def __init__(self, seed: int) -> None:
        """Draw what goes up and what goes down with a seed."""
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch's; what a product gives is changed."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _PRODUCTS or result.dtype not in _HALVES:
            return result
        generator = self._generators.get(result.device)
        if generator is None:
            generator = torch.Generator(result.device).manual_seed(self._seed)
            self._generators[result.device] = generator
        draws = torch.rand(result.shape, generator=generator, device=result.device)
        bit = torch.finfo(result.dtype).eps
        return (result.float() * (1 + bit * (2 * draws - 1))).to(result.dtype)


def allowed_by_rounding(reference: ReferenceRun, model: CausalLM, forward: Forward) -> float:
    """Return the relative error of logits that is no more than what another rounding may cause.

    Args:
        reference: What the model gave on a few tokens.
        model: The same model.
        forward: The function that was traced of it.

    Returns:
        0 in single and double precision, at most 0.7 in half precision.

    """
    if reference.dtype not in _HALVES:
        return 0.0
    moved = 0.0
    for seed in _SEEDS:
        with OtherRounding(seed):
            other = reference.rerun(model, forward)
        for phase, steps in reference.steps.items():
            for step, again in zip(steps, other.steps[phase], strict=True):
                rows = zip(torch.split(again.logits, 1), torch.split(step.logits, 1), strict=True)
                errors = sorted(relative_error(*row, median=step.long) for row in rows)
                moved = max(moved, errors[len(errors) // 2])
    return min(_TIMES * moved, _MOST)
