"""A few tokens through the user's own model, before anything of it is captured.

They show what each layer stores, and what logits every captured graph must give: a graph whose
code is only right for another cache or another attention (a mask that is made of the buffer's
length, say) is found out before it is used. Where a model's config names a window or a chunk, more
tokens than that are run as well, since code may be right up to there and no further.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaskip_passes import UnsupportedError

from ..kv_cache.buffers import CacheBuffers, LayerCacheSpec, State, StateKind
from ..kv_cache.names import cache_argument
from ..kv_cache.views import DynamicCacheView, LayerView, StaticCacheView
from . import attention, phase_graph
from .phase_graph import CapturedPhase, Forward, GraphKey, GraphPhase

_ROWS, _PROMPT, _EXTENSION, _ROOM = 3, 5, 2, 9
#: Beyond the longest window so many tokens are run and compared.
_BEYOND = 16
#: Config values that name how far something reaches, in tokens.
_REACHES = (
    *("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"),
    *("chunk_size", "mamba_chunk_size"),
)
#: Multiplications that a proof on a long prompt may take, by device: about a second.
_AFFORDABLE = {"cpu": 5e10, "cuda": 1e14}
#: Relative errors of the logits that other attention kernels may cause; a router's choice between
#: two experts may flip, so one of the rows is enough. Masks and positions that are wrong cost more.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF = 0.2
#: transformers' classes of a layer's memory that hold keys and values, states, both or nothing
#: (`DummyLayer` since 5.23)
_KNOWN_LAYERS = frozenset(
    {
        *("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer"),
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
)
_Memory = tuple[torch.Tensor | None, torch.Tensor | None, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class _Step:
    """New tokens [R, T] after `past` others, the memory of these by layer, and the logits."""

    ids: torch.Tensor
    past: int
    memory: tuple[_Memory, ...]
    logits: torch.Tensor

    @property
    def usable(self) -> bool:
        """Whether there are logits to compare with, and all of the memory (no short window)."""
        whole = all(keys is None or keys.shape[2] == self.past for keys, _, _ in self.memory)
        return whole and bool(self.logits.isfinite().all())

    @property
    def long(self) -> bool:
        """Whether it reaches beyond a window of the model."""
        return self.past + self.ids.shape[1] > _PROMPT + _EXTENSION


@dataclass(frozen=True)
class ReferenceRun:
    """What a model did with a few tokens.

    Attributes:
        slots: shapes of what each layer stores.
        dtype: of the model.
        attention: the implementation that it used.
        steps: a prompt, and a step of each other phase after it; each with few tokens, and with
            more than the model's windows hold.
    """

    slots: tuple[LayerCacheSpec, ...]
    dtype: torch.dtype
    attention: str
    steps: Mapping[GraphPhase, tuple[_Step, ...]]

    @property
    def device(self) -> torch.device:
        """Where the model was."""
        return self.steps["prefill"][0].logits.device

    def rerun(self, model: Any, forward: Forward) -> ReferenceRun:
        """The same of a compiled model, whose weights may have been changed since."""
        if model.config._attn_implementation != attention.NAME:
            return run_reference(model, forward)
        model.set_attn_implementation(self.attention)
        try:
            return run_reference(model, forward)
        finally:
            model.set_attn_implementation(attention.NAME)

    @torch.no_grad()
    def check(self, captured: CapturedPhase, model: Any, forward: Forward) -> None:
        """Compare what a captured graph gives, as it came, with what the user's model gave.

        Graphs that are right only for other lengths, or for an autocast region, are not checked.

        Args:
            captured: a phase of the compiled model.
            model, forward: the compiled model, and the function that was traced.

        Raises:
            UnsupportedError: the logits are others.
        """
        key = captured.key
        if key.surroundings.autocast or key.one_stored or key.dtype != self.dtype:
            return
        for step in self.steps["decode" if key.one_token else key.phase]:
            if step.logits.device == key.device and step.usable:
                self._compare(step, captured, model, forward)

    def _compare(self, step: _Step, captured: CapturedPhase, model: Any, forward: Forward) -> None:
        key, available = captured.key, step.ids.shape[0]
        what = f"{key.phase} on a static cache" if key.static_cache else key.phase
        errors = []
        for first in range(available):
            rows = torch.arange(first, first + key.batch, device=key.device) % available
            arguments = self._arguments(key, model, forward, step, rows)
            if not captured.guards().hold(arguments):
                return
            logits = _run(captured, arguments, what)
            kept = min(logits.shape[1], step.logits.shape[1])
            errors.append(
                relative_error(logits[:, -kept:], step.logits[rows][:, -kept:], step.long)
            )
            if errors[-1] <= tolerance(self.dtype):
                return
        raise UnsupportedError(
            f"the graph captured for {what} gives other logits than the model: on "
            f"{step.ids.shape[1]} token(s) after {step.past} they differ by {min(errors):.1e} of "
            "the largest. The model's code depends on something that was not captured (its cache's "
            "type, its attention implementation)."
        )

    def _arguments(
        self, key: GraphKey, model: Any, forward: Forward, step: _Step, rows: torch.Tensor
    ) -> dict[str, Any]:
        new = step.ids.shape[1]
        total = step.past + new
        storage = CacheBuffers.zeros(self.slots, key.batch, total + _ROOM, self.dtype, key.device)
        for i, (keys, values, states) in enumerate(step.memory):
            pairs = [(storage.keys[i], keys), (storage.values[i], values)]
            for mine, theirs in pairs:
                if mine is not None and theirs is not None:
                    mine[:, :, : step.past] = theirs[rows]
            for mine, theirs in zip(storage.states[i], states, strict=False):
                mine.copy_(theirs[rows])
        cache: DynamicCacheView | StaticCacheView
        if key.static_cache:
            position = torch.full((1,), step.past, dtype=torch.int64, device=key.device)
            cache = StaticCacheView.of(storage, self.slots, position, self.dtype)
        else:
            cache = _views(storage, self.slots, total, new, fresh=key.phase == "prefill")
        ids = step.ids[rows].contiguous()
        positions = torch.arange(step.past, total, device=key.device).expand(key.batch, new)
        mask = torch.ones(key.batch, total, dtype=torch.bool, device=key.device)
        inputs = phase_graph.step_inputs(
            forward, ids, positions.contiguous(), mask if key.masked else None, key.logits_to_keep
        )
        return phase_graph.bind_arguments(model, forward, cache, inputs)


@torch.no_grad()
def run_reference(model: Any, forward: Forward | None = None) -> ReferenceRun:
    """Run a model eagerly on a few tokens, outside of any autocast region that this is called in.

    (In one, mixers' states would be seen in half precision, and stored so for all requests.)

    Args:
        model: as the user has it; or a compiled model, with the `forward` of what it was made of
            and the attention of :mod:`adaskip_fx.capture.attention`, which is left out meanwhile.

    Raises:
        UnsupportedError: it does not run on a cache of transformers', or keeps something else in it
            than keys, values and mixers' states.
    """
    forward = forward or type(model).forward
    prompts = [(_ROWS, _PROMPT)]
    if (reach := _reach(model)) is not None:
        prompts.append((1, reach + _BEYOND))
    slots: tuple[LayerCacheSpec, ...] = ()
    steps: dict[GraphPhase, tuple[_Step, ...]] = {}
    with torch.autocast(model.device.type, enabled=False):
        for rows, length in prompts:
            slots, taken = _steps(model, forward, _tokens(model, rows, length + _EXTENSION), slots)
            steps = {phase: (*steps.get(phase, ()), step) for phase, step in taken.items()}
    return ReferenceRun(slots, model.dtype, model.config._attn_implementation, steps)


def _tokens(model: Any, rows: int, count: int) -> torch.Tensor:
    """Random ids [rows, count]; on the CPU first, whatever the default device is."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (rows, count), generator=generator, device="cpu")
    return ids.to(model.device)


def _steps(
    model: Any, forward: Forward, ids: torch.Tensor, slots: tuple[LayerCacheSpec, ...]
) -> tuple[tuple[LayerCacheSpec, ...], dict[GraphPhase, _Step]]:
    """A prompt, and one and two tokens after it; and what layers store, if `slots` does not say."""
    prompt, more = ids[:, :-_EXTENSION], ids[:, -_EXTENSION:]
    steps: dict[GraphPhase, _Step] = {}
    past = prompt.shape[1]
    after: tuple[tuple[GraphPhase, torch.Tensor], ...] = (
        ("decode", more[:, :1]),
        ("extend", more),
    )
    for phase, new in after:
        cache = new_cache(model)
        logits = _logits(model, forward, prompt, cache, 0)
        slots = slots or _slots(model, cache)
        steps.setdefault("prefill", _Step(prompt, 0, (), logits[:, -_BEYOND:]))
        layers = zip(cache.layers, slots, strict=False)
        memory = tuple(_memory(layer, slot) for layer, slot in layers)
        steps[phase] = _Step(new, past, memory, _logits(model, forward, new, cache, past))
    return slots, steps


def _reach(model: Any) -> int | None:
    """The longest window or chunk that the config names and that can be passed at a small cost."""
    config = model.config.get_text_config()
    named = (getattr(config, name, None) for name in _REACHES)
    reaches = [n for n in named if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    longest = positions(model)
    size = sum(p.numel() for p in model.parameters())
    kind = model.device.type
    affordable = [
        n
        for n in reaches
        if (longest is None or n + _BEYOND + _EXTENSION <= longest)
        and 6.0 * size * (n + _BEYOND) <= _AFFORDABLE.get(kind, _AFFORDABLE["cpu"])
    ]
    return max(affordable, default=None)


def positions(model: Any) -> int | None:
    """How many positions a model has; None if there is no limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            return longest
    return None


def new_cache(model: Any) -> Any:
    """transformers' own, whose layers keep all keys and values: a window is the mask's matter."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer

    whole = {
        "DynamicSlidingWindowLayer": DynamicLayer,
        "LinearAttentionAndSlidingWindowAttentionLayer": LinearAttentionAndFullAttentionLayer,
    }
    cache = DynamicCache(config=model.config.get_text_config())
    kinds = [whole.get(type(layer).__name__) for layer in cache.layers]
    cache.layers = [
        layer if kind is None else kind() for layer, kind in zip(cache.layers, kinds, strict=True)
    ]
    return cache


def _logits(model: Any, forward: Forward, ids: torch.Tensor, cache: Any, past: int) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, cache_argument(forward): cache}
    if "position_ids" in inspect.signature(forward).parameters:
        places = torch.arange(past, past + ids.shape[1], device=ids.device)
        inputs["position_ids"] = places.expand_as(ids)
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


def _slots(model: Any, cache: Any) -> tuple[LayerCacheSpec, ...]:
    slots = [_slot(index, layer) for index, layer in enumerate(cache.layers)]
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    return (*slots, *[LayerCacheSpec()] * (layers - len(slots)))


def _slot(index: int, layer: Any) -> LayerCacheSpec:
    kind = type(layer).__name__
    if kind not in _KNOWN_LAYERS:
        raise UnsupportedError(
            f"layer {index} keeps its memory in a {kind}; supported are keys and values, and the "
            "states of mixers"
        )
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    states = (*_states("conv", layer), *_states("recurrent", layer))
    shapes = tuple(State(k, i, tuple(t.shape[1:]), t.dtype) for k, i, t in states)
    if keys is None or values is None:
        return LayerCacheSpec(states=shapes)
    if keys.dim() != 4:
        raise UnsupportedError(
            f"layer {index} keeps keys of shape {list(keys.shape)}, not [B, H, T, D]"
        )
    return LayerCacheSpec(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], shapes)


def _states(kind: StateKind, layer: Any) -> list[tuple[StateKind, int, torch.Tensor]]:
    tensors = getattr(layer, f"{kind}_states", {})
    return [(kind, index, t) for index, t in tensors.items() if t is not None]


def _memory(layer: Any, slot: LayerCacheSpec) -> _Memory:
    """Copies of what a layer holds."""
    states = (*_states("conv", layer), *_states("recurrent", layer))
    held = tuple(t.clone() for _, _, t in states)
    if not slot.attends:
        return None, None, held
    return layer.keys.clone(), layer.values.clone(), held


def _views(
    storage: CacheBuffers, slots: tuple[LayerCacheSpec, ...], total: int, new: int, fresh: bool
) -> DynamicCacheView:
    layers = []
    for i, slot in enumerate(slots):
        keys, values = (
            t.narrow(2, 0, total) if t is not None else None
            for t in (storage.keys[i], storage.values[i])
        )
        layers.append(LayerView(slot, keys, values, storage.states[i]))
    filled, fresh_part = (storage.lengths.narrow(0, 0, n) for n in (total, new))
    return DynamicCacheView(layers, filled, fresh_part, fresh)


def _run(captured: CapturedPhase, arguments: dict[str, Any], what: str) -> torch.Tensor:
    """Logits of the captured graph, run node by node."""
    graph = captured.capture.graph
    values = (*captured.fixed(arguments), *captured.step(arguments))
    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    inputs = (values[captured.place[name]] for name in names)
    try:
        logits: torch.Tensor = fx.Interpreter(graph, garbage_collect_values=True).run(*inputs)[0]
    except RuntimeError as error:  # an assertion about values that was captured
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"the graph captured for {what} does not run: {reason}") from error
    return logits


def tolerance(dtype: torch.dtype) -> float:
    """The relative error of logits that other kernels may cause."""
    return _TOLERANCES.get(dtype, _HALF)


def relative_error(got: torch.Tensor, want: torch.Tensor, median: bool = False) -> float:
    """The largest difference, in units of the largest expected value; infinite for NaN.

    `median`: of that of each token, because among many a router's choice may flip for one.
    """
    each = (got.double() - want.double()).abs().flatten(2).amax(2)
    error = (each.median() if median else each.max()) / want.double().abs().max().clamp_min(1e-30)
    return float("inf") if bool(error.isnan()) else float(error)
