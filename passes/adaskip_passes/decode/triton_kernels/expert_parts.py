"""What the kernels of chosen experts share: the gate, waiting, and the sum of a token's experts.

A kernel lets the next one start when it has waited for those before it. So the next one may read
what a router chose before it waits: whoever wrote that has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, clamp, alpha, CLAMPED: tl.constexpr):
    """Return SwiGLU, or GPT-OSS's with clamps."""
    if CLAMPED:
        gate = tl.minimum(gate, clamp, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, clamp, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -clamp, propagate_nan=tl.PropagateNan.ALL)
        return (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernels before, and let the next one start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(at):
    """Have the 128 bytes at each of some addresses read into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def combine(
    parts, chosen, shares, bias, residual, out,
    N: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr, SPLITS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum what a token's experts gave, each by its share: BN outputs of a token a program."""
    wait(PDL)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1)
    inside = outs < N
    total = tl.zeros([BN], tl.float32)
    for j in tl.static_range(COUNT):
        pair = token * COUNT + j
        expert = tl.load(chosen + pair)
        mask = inside & (expert >= 0) & (expert < E)
        one = tl.zeros([BN], tl.float32)
        for s in tl.static_range(SPLITS):
            one += tl.load(parts + (pair * SPLITS + s) * N + outs, mask=mask, other=0.0)
        if BIAS:
            one += tl.load(bias + expert * N + outs, mask=mask, other=0.0).to(tl.float32)
        total += one * tl.load(shares + pair).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + token * N + outs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + outs, total.to(out.dtype.element_ty), mask=inside)
