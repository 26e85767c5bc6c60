"""Latent attention, key by key in float64: keys are a latent and the rest, values the latent."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import attention_oracle as oracle

#: Numbers of a latent, and of the rest of a key.
RANK, REST = 24, 8
LATENT_CASES: dict[str, dict[str, Any]] = {
    "ragged": {"batch": 3, "lengths": (300, 17, 1)},
    "several queries": {"batch": 2, "tokens": 5, "lengths": (120, 3), "heads": 7},
    "window and sinks": {"windows": (16,), "sinks": (4,), "lengths": (100, 9), "batch": 2},
    "soft cap and sink scores": {"softcap": 2.0, "sink_scores": True, "lengths": (70,)},
    "many heads": {"heads": 40, "lengths": (90,)},
}


def latent(seed: int, name: str, sizes: tuple[int, int] = (RANK, REST), **more: Any) -> oracle.Case:
    """A case whose values are the first numbers of its keys."""
    rank, rest = sizes
    shape = {"kv_heads": 1, "dim": rank + rest, "value_dim": rank}
    case = oracle.make(seed, **{**LATENT_CASES[name], **shape, **more})
    case.keys[..., :rank] = case.values
    return case


def latent_arguments(case: oracle.Case) -> tuple[Any, ...]:
    """Inputs of `attend_latent`."""
    rank = case.values.shape[3]
    return (case.query, case.keys[..., :rank], case.keys[..., rank:], *case.arguments()[3:])


def latent_step_arguments(made: oracle.Step) -> tuple[Any, ...]:
    """Inputs of `store_and_attend_latent` that rotate nothing."""
    rank = made.values.shape[3]
    buffers, new = (
        tuple(part.contiguous() for part in (keys[..., :rank], keys[..., rank:]))
        for keys in (made.keys, made.new_keys)
    )
    return (made.query, *buffers, *new, None, None, *made.case.arguments()[3:])


def rotating_step_arguments(
    made: oracle.Step, kind: str, by_row: bool, interleaved: bool, unzipped: bool
) -> tuple[Any, ...]:
    """Inputs that give the same when the rests of queries and new keys are rotated.

    Args:
        made: A step that rotates nothing.
        kind: Whether angles are of ``"numbers"``, of ``"pairs"``, or ``"complex"`` numbers.
        by_row: Whether each row has its own.
        interleaved: Whether neighbours are pairs.
        unzipped: Whether they are put into halves then.

    """
    query, *buffers, latents, rests, _, _ = latent_step_arguments(made)[:7]
    rank, dim, device = latents.shape[3], rests.shape[3], query.device
    shape = (query.shape[0] if by_row else 1, 1, query.shape[2], dim // 2)
    angles = (torch.rand(shape, dtype=torch.float64) * 6).to(device)

    def before(rest: torch.Tensor) -> torch.Tensor:
        zipped = rest.unflatten(-1, (2, -1)).mT.flatten(-2) if unzipped else rest
        return oracle.turned_back(zipped, angles, interleaved)

    cosines, sines = angles.cos().float(), angles.sin().float()
    if kind == "numbers":
        cosines, sines = (
            t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
            for t in (cosines, sines)
        )
    elif kind == "complex":
        both = torch.view_as_real(torch.complex(cosines, sines))
        cosines, sines = both[..., 0], both[..., 1]
    query = torch.cat((query[..., :rank], before(query[..., rank:])), -1)
    new = latents, before(rests), cosines, sines
    return (query, *buffers, *new, *made.case.arguments()[3:], interleaved, unzipped)
