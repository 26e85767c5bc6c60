"""Attention of prompts that sees the last tokens and the first ones, by K/V head.

The token at position t sees the one at j if ``t - tokens < j <= t`` or ``j < sinks`` (Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", section 3). Sinks and tokens come as a
table, int64 [H_kv, 2] on the CPU: data, so that one compiled piece serves all windows. Soft caps
on the scores (Gemma 2) and sinks that are scores (GPT-OSS) are inputs too, also where all is seen.

On a static cache the same numbers are columns of a table of bounds (:mod:`.bounds`).
"""

from __future__ import annotations

import itertools

import torch

from ..decode.ops import EVERY
from .blocks import alike, by_window, heads_of
from .seen import attend_seen

# (As `attend_causal`: an operator of `torch.library.custom_op` takes longer to call.)
torch.library.define(
    "adaskip::attend_windowed",
    "(Tensor query, Tensor key, Tensor value, Tensor? windows, SymInt own, float scale, "
    "float softcap=0.0, Tensor? sink_scores=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("adaskip::attend_windowed", "default", by_window)  # on any device


def attend_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the last T of S tokens to those in each one's window; heads are not repeated.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        windows: Sinks and tokens of each K/V head, int64 [H_kv, 2], on the CPU; None where all
            heads see `own` tokens.
        own: Tokens that the model itself sees there; `EVERY` for all. The smaller one counts, and
            there are no sinks but where it is `EVERY`.
        scale: Of the scores.
        softcap: Bound of the scores, ``softcap * tanh(score / softcap)``; 0 for none.
        sink_scores: A score of each head [H] that takes attention and gives nothing.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    given = query, key, value, windows, own, scale, softcap, sink_scores
    output: torch.Tensor = torch.ops.adaskip.attend_windowed.default(*given)
    return output


def _shaped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_more: object
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3]))


torch.library.register_fake("adaskip::attend_windowed", _shaped)


@torch.library.custom_op("adaskip::attend_packed_windowed", mutates_args=())
def attend_packed_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `attend_windowed` does within each of several texts that follow one another.

    Args:
        query: [1, H, N, D].
        key: [1, H_kv, N, D]; H is a multiple of H_kv.
        value: [1, H_kv, N, D_v].
        offsets: Where each text begins, and N: int32 [texts + 1], on the CPU.
        windows: As of `attend_windowed`.
        own: Likewise.
        scale: Of the scores.
        softcap: As of `attend_windowed`.
        sink_scores: Likewise.

    Returns:
        [1, N, H, D_v], contiguous.

    """
    heads, tokens = query.shape[1:3]
    output = query.new_empty((1, tokens, heads, value.shape[3]))
    for begin, end in itertools.pairwise(offsets.tolist()):
        q, k, v = (t.narrow(2, begin, end - begin) for t in (query, key, value))
        output[:, begin:end] = attend_windowed(q, k, v, windows, own, scale, softcap, sink_scores)
    return output


@attend_packed_windowed.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    windows: torch.Tensor | None,
    own: int,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty((1, tokens, heads, value.shape[3]))


@torch.library.custom_op("adaskip::attend_masked_windowed", mutates_args=())
def attend_masked_windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    windows: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `attend_windowed` does, of the tokens that a mask lets through.

    A query's own position is the last one that it sees, and the first token of a row the first one
    that any query of it sees. All scores are computed: this is for rows with holes.

    Args:
        query: [B, H, T, D].
        key: [B, H_kv, S, D]; H is a multiple of H_kv.
        value: [B, H_kv, S, D_v].
        mask: Bool [B or 1, 1, T, S], True where a query sees a key.
        windows: As of `attend_windowed`; None where the mask says all.
        scale: Of the scores.
        softcap: As of `attend_windowed`.
        sink_scores: Likewise.

    Returns:
        [B, T, H, D_v], contiguous.

    """
    if windows is None:
        return attend_seen(query, key, value, mask, scale, softcap, sink_scores)
    batch, heads, tokens, _ = query.shape
    output = query.new_empty((batch, tokens, heads, value.shape[3]))
    position = torch.arange(key.shape[2], device=query.device)
    own = torch.where(mask, position, -1).amax(-1, keepdim=True)
    first = torch.where(mask, position, key.shape[2]).amin((-2, -1), keepdim=True)
    for chosen, (sinks, seen) in alike(windows, key.shape[2], EVERY, key.shape[1]):
        q, k, v, theirs = heads_of(query, key, value, chosen)
        near = mask & ((position > own - seen) | (position < first + sinks))
        scores = None if sink_scores is None else sink_scores[theirs]
        output[:, :, theirs] = attend_seen(q, k, v, near, scale, softcap, scores)
    return output


@attend_masked_windowed.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    windows: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3]))
