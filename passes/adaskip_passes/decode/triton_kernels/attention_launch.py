"""How :mod:`.decode_attention` is launched: its sizes, arguments and constants."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ...infra.launch import Launch, has_pdl
from .attention_sizes import PROGRAMS, Sizes, sizes
from .combine import combine
from .decode_attention import _attend


def attend(*inputs: Any, latent: bool = False) -> torch.Tensor:
    """Compute :func:`ops.store_and_attend`, which describes the inputs."""
    launches = attention(*inputs, latent=latent)
    for launch in launches:
        launch.run()
    return launches[-1].outputs[0]


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    bounds: torch.Tensor,
    scale: float,
    softcap: float,
    sink_scores: torch.Tensor | None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    unzipped: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    *,
    latent: bool = False,
) -> list[Launch]:
    """Return the launches of :func:`ops.store_and_attend`, which describes the other inputs.

    Args:
        query: The queries.
        keys: The keys.
        values: The values.
        new_keys: Keys of the queries' own tokens, to be stored; None if they are.
        new_values: Likewise.
        cosines: Of the angles by which queries and new keys are rotated; None if they are.
        sines: Likewise.
        bounds: Which of them count.
        scale: Of the scores.
        softcap: Their bound; 0 for none.
        sink_scores: Of each head, or None.
        rotary_dim: How many of a head's numbers are rotated; 0: all.
        interleaved: Whether neighbours are pairs.
        unzipped: Whether they are put into halves then; of a latent's rest alone.
        query_norm: Weight of the norm of queries, of heads whose size is a power of two.
        key_norm: Likewise of new keys.
        eps: Of both.
        offset: Of both.
        latent: Whether keys are latents, which are the values as well, and values the rest of the
            keys: :func:`latent_ops.store_and_attend_latent`.

    """
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = keys.shape[1], (keys if latent else values).shape[3]
    cut = sizes(query, keys, value_dim, bounds.shape[1] == 1, latent)
    output = query.new_empty((batch, tokens, heads, value_dim))
    slots = cut.groups * cut.shares * cut.group
    partial = query.new_empty(slots * cut.padded_values, dtype=torch.float32)
    weight = query.new_empty(slots * 2, dtype=torch.float32)
    used = query.new_empty(cut.groups, dtype=torch.int32)
    query, *query_strides = _strided(query)
    new_keys, *new_key_strides = _strided(new_keys)
    new_values, *new_value_strides = _strided(new_values)
    turned = cut.rest if latent else rotary_dim or dim
    pairs = cosines is not None and cosines.shape[3] != turned
    cosines, sines, step, *angle_strides = _angles(cosines, sines, batch)
    arguments = (
        *(query, keys, values, partial, weight, used, bounds, scale, softcap),
        *(new_keys, new_values, cosines, sines, query_norm, key_norm, eps, offset),
        *(*new_key_strides, *new_value_strides, *angle_strides),
        *(*query_strides, *keys.stride()[:3], *values.stride()[:3]),
        *(bounds.stride(0), bounds.stride(1), tokens, batch),
    )
    form = {"H": heads, "HK": kv_heads, "DV": value_dim, **_form(cut, query.device)}
    flags = {
        **form,
        **{"HB": bounds.shape[1], "EP": triton.next_power_of_2(cut.rows * bounds.shape[1])},
        **{"D": cut.first, "DP": cut.padded, "DR": cut.rest, "DRP": cut.padded_rest},
        **{"TP": cut.own, "BN": cut.block, "STAGES": cut.stages, "num_warps": cut.warps},
        **{"PAIRS": pairs, "STEP": step, "ROTARY": turned, "PROGRAMS": PROGRAMS},
        **{"INTERLEAVED": interleaved, "UNZIPPED": unzipped, "LATENT": latent},
        **{"SOFTCAP": softcap != 0.0, "PLAIN": tokens == 1},
        "WIDE": max(_numel(keys), _numel(values)) >= 2**31,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    grid = cut.groups, cut.shares
    shares = Launch(_attend, grid, arguments, flags, [partial, weight, used])
    whole = (output, partial, weight, sink_scores, used, tokens)
    form["num_warps"] = max(2, min(8, cut.shares * cut.padded_values // 4096))
    grid = cut.groups, min(cut.group, cut.queries)
    return [shares, Launch(combine, grid, whole, form, [output])]


def _form(cut: Sizes, device: torch.device) -> dict[str, Any]:
    """Return the constants that both kernels have of how the work is cut."""
    pdl = has_pdl(device)
    form = {"DVP": cut.padded_values, "GP": cut.group, "SPLITS": cut.shares, "PDL": pdl}
    return {**form, **({"launch_pdl": True} if pdl else {})}


def _numel(tensor: torch.Tensor) -> int:
    """Return a tensor's numbers; of one with symbolic sizes those of the example."""
    count = tensor.numel()
    return count.node.hint if isinstance(count, torch.SymInt) else count


def _strided(tokens: torch.Tensor | None) -> tuple[Any, ...]:
    """Return a tensor [B, H, T, D] without gaps in its last dimension, and its strides."""
    if tokens is None:
        return None, 0, 0, 0
    whole = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    return whole, *whole.stride()[:3]


def _angles(
    cosines: torch.Tensor | None, sines: torch.Tensor | None, batch: int
) -> tuple[Any, ...]:
    """Return both for each row, how far their numbers are apart, rows and tokens.

    They may be the two parts of complex numbers.
    """
    if cosines is None or sines is None:
        return None, None, 1, 0, 0
    if cosines.stride(3) not in (1, 2) or cosines.stride() != sines.stride():
        cosines, sines = cosines.contiguous(), sines.contiguous()
    by_row = cosines.stride(0) if cosines.shape[0] == batch else 0
    return cosines, sines, cosines.stride(3), by_row, cosines.stride(2)
