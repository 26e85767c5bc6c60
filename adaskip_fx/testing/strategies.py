"""Hypothesis strategies: skip plans, prompts and tiny configurations to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from ..plans.skip_plan import Action, SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.surrogate import SHAPES, Surrogate
from ..plans.surrogates import Surrogates
from ..plans.windows import Window, Windows
from .equivalence import compiled_for
from .families import FAMILIES, tiny_config

#: What each kind of sublayer may do in prefill and decode. The first, run in both, is the simplest:
#: a failing plan shrinks to the fewest sublayers.
_ACTIONS = {
    "attention": (
        ("run", "run"),
        ("skip", "skip"),
        ("kv_only", "run"),
        ("run", "kv_only"),
        ("kv_only", "kv_only"),
    ),
    "mixer": (("run", "run"), ("skip", "skip")),
    "ffn": (("run", "run"), ("skip", "skip"), ("run", "skip"), ("skip", "run")),
}
_FACTORS = st.floats(0.25, 2.0, width=32)
_TENSORS = ("diagonal", "low_rank", "linear", "normalized")


def plans(model: Any, *, windows: bool = False) -> st.SearchStrategy[SkipPlan]:
    """Draw a skip plan for a model: what is skipped in which phase, and its surrogates.

    Args:
        model: a decoder as :func:`adaskip_fx.compile` takes it, whose sublayers are looked up; or
            the sublayers themselves, in the order of the residual stream, and then the surrogates
            are scales alone.
        windows: whether attention that runs may see windows, where it can; not of sublayers alone.
    """
    if isinstance(model, Sequence):
        return _plans(tuple(model), None, {})
    hidden = model.get_input_embeddings().weight.shape[1]
    handle = compiled_for(model).adaskip
    return _plans(handle.sublayers, hidden, handle.kv_heads if windows else {})


def surrogates(hidden: int | None) -> st.SearchStrategy[Surrogate]:
    """Draw a surrogate for hidden states of width `hidden`; a scale where that is None."""
    scales = _FACTORS.map(Surrogate.scale)
    if hidden is None:
        return scales
    drawn = st.tuples(st.sampled_from(_TENSORS), st.integers(1, 4), st.integers(0, 2**16))
    return scales | drawn.map(lambda values: _random_surrogate(*values, hidden))


def _random_surrogate(kind: Any, rank: int, seed: int, hidden: int) -> Surrogate:
    """Return a surrogate with entries as large as what sublayers add."""
    draw, sizes = np.random.default_rng(seed), {"H": hidden, "r": rank}
    shapes = {name: [sizes[n] for n in letters] for name, letters in SHAPES[kind].items()}
    return Surrogate(
        kind, {n: draw.normal(size=shape) / np.sqrt(hidden) for n, shape in shapes.items()}
    )


def _windows(heads: int) -> st.SearchStrategy[Window | None]:
    full = st.sets(st.integers(0, heads - 1), max_size=heads).map(tuple)
    return st.none() | st.builds(Window, st.integers(1, 12), st.integers(0, 4), full)


@st.composite
def _plans(
    draw: st.DrawFn,
    sublayers: tuple[Sublayer, ...],
    hidden: int | None,
    heads: Mapping[Sublayer, int],
) -> SkipPlan:
    actions = {s: draw(st.sampled_from(_ACTIONS[s.kind]), label=str(s)) for s in sublayers}
    for phase in (0, 1):
        if all(a[phase] != "run" for a in actions.values()):
            actions[sublayers[-1]] = ("run", "run")
    left_out = [s for s, pair in actions.items() if pair != ("run", "run")]
    drawn = {s: draw(st.none() | surrogates(hidden), label=f"x {s}") for s in left_out}
    narrow: list[dict[Sublayer, Window]] = [{}, {}]
    for sublayer, count in heads.items():
        for phase in (0, 1):
            window = draw(_windows(count), label=f"window {sublayer}")
            if window is not None and actions[sublayer][phase] == "run":
                narrow[phase][sublayer] = window
    return SkipPlan(
        sublayers,
        {s: Action(pair[0]) for s, pair in actions.items()},
        {s: Action(pair[1]) for s, pair in actions.items()},
        Surrogates({s: c for s, c in drawn.items() if c is not None}),
        windows=Windows(*narrow),
    )


@st.composite
def prompts(
    draw: st.DrawFn, model: Any, *, max_tokens: int = 17, max_batch: int = 2, padding: bool = True
) -> dict[str, torch.Tensor]:
    """Draw a prompt for a model: ``input_ids`` [B, T] and, of padded rows, ``attention_mask``.

    Args:
        draw: supplied by hypothesis.
        model: gives the vocabulary and the device.
        max_tokens: T at most; two at least.
        max_batch: B at most.
        padding: whether rows may be padded, on the left.
    """
    batch, tokens = draw(st.integers(1, max_batch)), draw(st.integers(2, max_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed of tokens"))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    prompt = {"input_ids": ids.to(model.device)}
    if padding and batch > 1 and draw(st.booleans(), label="padded"):
        missing = [draw(st.integers(0, tokens - 1)) for _ in range(batch - 1)] + [0]
        positions = torch.arange(tokens).expand(batch, -1)
        mask = positions >= torch.tensor(missing).unsqueeze(1)
        prompt["attention_mask"] = mask.long().to(model.device)
    return prompt


@st.composite
def tiny_configs(draw: st.DrawFn, family: str) -> Any:
    """Draw a configuration of a family, so small that a model of it takes milliseconds to make.

    Args:
        draw: supplied by hypothesis.
        family: ``llama``, ``mistral``, ``qwen3``, ``gemma2``, ``phi3``, ``gpt2``, ``gpt_neox``,
            ``mixtral``, ``gpt_oss``, ``deepseek_v3``, ``mamba2`` or ``jamba``.
    """
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; known: {', '.join(sorted(FAMILIES))}")
    drawn = {name: draw(st.sampled_from(v), label=name) for name, v in FAMILIES[family].vary}
    return tiny_config(family, **drawn)
