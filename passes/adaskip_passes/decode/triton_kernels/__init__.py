"""Triton kernels for `ops`, on CUDA.

They are bound by reading memory: every weight, key and value is read once, in 16-byte accesses,
and nothing intermediate is written but the norms of several rows. Kernels are launched with
programmatic dependence (PDL): a kernel starts while the one before it ends, loads its first
weights, which nobody writes, and only then waits for its input.
"""

from .attention_launch import attend, attention
from .experts import choice, choice_in_groups, choose_experts, expert_launches, run_experts
from .norms import normalization, normalize
from .projections import project, projection
from .rank_sums import rank_sum

__all__ = [
    "attend",
    "attention",
    "choice",
    "choice_in_groups",
    "choose_experts",
    "expert_launches",
    "normalization",
    "normalize",
    "project",
    "projection",
    "rank_sum",
    "run_experts",
]
