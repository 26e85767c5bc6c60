"""A few tokens through the user's own model, before anything of it is captured.

They show what each layer stores, and what logits every captured graph must give: a graph whose
code is only right for another cache or another attention (a mask that is made of the buffer's
length, say) is found out before it is used (:mod:`adaskip_fx.capture.check_graph`). Where a
model's config names a window or a chunk, more tokens than that are run as well, since code may be
right up to there and no further.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from adaskip_passes import UnsupportedError

from ..kv_cache.argument_names import cache_argument
from ..kv_cache.layer_spec import LayerCacheSpec
from ..utils.transformers_internals import attention_name, set_attention
from ..utils.transformers_types import CausalLM
from . import attention, experts, rotary
from .arguments import Forward
from .graph_key import GraphPhase
from .layer_memory import LayerMemory, layer_specs, memory_of, new_cache
from .traced_part import decoder_name, traced_forward

_ROWS, _PROMPT, _EXTENSION = 3, 5, 2
#: Beyond the longest window so many tokens are run and compared.
_BEYOND = 16
#: Config values that name how far something reaches, in tokens.
_REACHES = (
    *("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"),
    *("chunk_size", "mamba_chunk_size"),
)
#: Relative errors of logits that other attention kernels may cause. Masks and positions that are
#: wrong cost more.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 0.2
#: Multiplications that a proof on a long prompt may take, by device: about a second.
_AFFORDABLE = {"cpu": 5e10, "cuda": 1e14}


@dataclass(frozen=True)
class ReferenceStep:
    """One step of a reference run.

    Attributes:
        ids: new tokens, int64 [R, T].
        past: tokens before them.
        memory: what layers stored of those before, by layer.
        logits: [R, T, V] of the step, or of its last tokens.
    """

    ids: torch.Tensor
    past: int
    memory: tuple[LayerMemory, ...]
    logits: torch.Tensor

    @property
    def usable(self) -> bool:
        """Whether there are logits to compare with, and all of the memory (no short window)."""
        whole = all(keys is None or keys.shape[2] == self.past for keys, _, _ in self.memory)
        return whole and bool(self.logits.isfinite().all())

    @property
    def long(self) -> bool:
        """Whether the step reaches beyond a window of the model."""
        return self.past + self.ids.shape[1] > _PROMPT + _EXTENSION


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """What a model did with a few tokens.

    Attributes:
        specs: what each layer stores.
        dtype: of the model.
        attention: the attention implementation that it used.
        experts: the implementation of experts, of each part of it that has a config.
        steps: a prompt, and a step of each other phase after it; each with few tokens, and with
            more than the model's windows hold.
        tolerance: relative error of logits that is no sign of another computation.
    """

    specs: tuple[LayerCacheSpec, ...]
    dtype: torch.dtype
    attention: str | None
    experts: dict[str, str | None]
    steps: Mapping[GraphPhase, tuple[ReferenceStep, ...]]
    tolerance: float

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.steps["prefill"][0].logits.device

    def rerun(self, model: CausalLM, forward: Forward) -> ReferenceRun:
        """Return the same run of a compiled model, whose weights may have been changed since."""
        with self.implementations_of(model):
            return run_reference(model, forward)

    @contextmanager
    def implementations_of(self, model: CausalLM) -> Iterator[None]:
        """Meanwhile a compiled model has the attention and experts that the user's model has."""
        ours = attention_name(model) == attention.NAME
        named = model.get_experts_implementation()
        if ours:
            set_attention(model, self.attention)
        if exchanged := experts.NAME in named.values():
            model.set_experts_implementation(self.experts)
        try:
            yield
        finally:
            if ours:
                set_attention(model, attention.NAME)
            if exchanged:
                model.set_experts_implementation(named)


@torch.no_grad()
def run_reference(model: CausalLM, forward: Forward | None = None) -> ReferenceRun:
    """Run a model eagerly on a few tokens, outside of any autocast region that this is called in.

    (In one, mixers' states would be seen in half precision, and stored so for all requests.)

    Args:
        model: as the user has it; or a compiled model, for which the attention of
            :mod:`adaskip_fx.capture.attention` is left out meanwhile.
        forward: what is traced of the model that a compiled one was made of; of this one if None.

    Raises:
        UnsupportedError: it does not run on a cache of transformers', or keeps something else in it
            than keys, values and mixers' states.
    """
    forward = forward or traced_forward(model, decoder_name(model))
    prompts = [(_ROWS, _PROMPT)]
    if (reach := _reach(model)) is not None:
        prompts.append((1, reach + _BEYOND))
    specs: tuple[LayerCacheSpec, ...] = ()
    steps: dict[GraphPhase, tuple[ReferenceStep, ...]] = {}
    with torch.autocast(model.device.type, enabled=False), rotary.as_written(model):
        for rows, length in prompts:
            specs, ran = _steps(model, forward, _tokens(model, rows, length + _EXTENSION), specs)
            steps = {phase: (*steps.get(phase, ()), step) for phase, step in ran.items()}
    named = attention_name(model), model.get_experts_implementation()
    return ReferenceRun(specs, model.dtype, *named, steps, tolerance(model.dtype))


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error of logits that other kernels may cause."""
    return _TOLERANCES.get(dtype, _HALF)


def _tokens(model: CausalLM, rows: int, count: int) -> torch.Tensor:
    """Return random ids [rows, count]; made on the CPU first, whatever the default device is."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (rows, count), generator=generator, device="cpu")
    return ids.to(model.device)


def _steps(
    model: CausalLM, forward: Forward, ids: torch.Tensor, specs: tuple[LayerCacheSpec, ...]
) -> tuple[tuple[LayerCacheSpec, ...], dict[GraphPhase, ReferenceStep]]:
    """Run a prompt, and one and two tokens after it; `specs` of layers are found out if empty."""
    prompt, more = ids[:, :-_EXTENSION], ids[:, -_EXTENSION:]
    steps: dict[GraphPhase, ReferenceStep] = {}
    past = prompt.shape[1]
    after: tuple[tuple[GraphPhase, torch.Tensor], ...] = (
        ("decode", more[:, :1]),
        ("extend", more),
    )
    for phase, new in after:
        cache = new_cache(model)
        logits = _logits(model, forward, prompt, cache, 0)
        specs = specs or layer_specs(model, cache)
        steps.setdefault("prefill", ReferenceStep(prompt, 0, (), logits[:, -_BEYOND:]))
        layers = zip(cache.layers, specs, strict=False)
        memory = tuple(memory_of(layer, spec) for layer, spec in layers)
        steps[phase] = ReferenceStep(new, past, memory, _logits(model, forward, new, cache, past))
    return specs, steps


def _reach(model: CausalLM) -> int | None:
    """Return how far to go past windows, chunks and other frequencies, at a small cost."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _REACHES)
    reaches = [n for n in named if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    longest = positions(model)
    size = sum(p.numel() for p in model.parameters())
    kind = model.device.type
    within = [n for n in reaches if longest is None or n + _BEYOND + _EXTENSION <= longest]
    within += rotary.switches_at(model)
    most = _AFFORDABLE.get(kind, _AFFORDABLE["cpu"])
    affordable = (n for n in within if 6.0 * size * (n + _BEYOND) <= most)
    return max(affordable, default=None)


def positions(model: CausalLM) -> int | None:
    """Return how many positions a model has; None if there is no limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            return longest
    return None


def relies_on_length(model: CausalLM) -> bool:
    """Return whether a model's number of positions has a name that code relies on (MPT)."""
    config = model.config.get_text_config()
    return not isinstance(getattr(config, "max_position_embeddings", None), int)


def _logits(
    model: CausalLM, forward: Forward, ids: torch.Tensor, cache: Any, past: int
) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, cache_argument(forward): cache}
    if "position_ids" in inspect.signature(forward).parameters:
        order = torch.arange(past, past + ids.shape[1], device=ids.device)
        inputs["position_ids"] = order.expand_as(ids)
    if "return_dict" in inspect.signature(forward).parameters:
        inputs["return_dict"] = True
    try:
        logits: torch.Tensor = forward(model, **inputs, use_cache=True).logits
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} does not run on a DynamicCache, so its memory is not known: "
            f"{type(error).__name__}: {error}"
        ) from error
    return logits
