"""A dozen tiny Llama models, each compiled once in a process, and what property tests draw.

A property test draws a model of the bank, a plan, lengths and tokens. The plan is set on the
model's runtime before the request begins, so no example costs a capture after the first ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from adaskip_fx.api import build
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Action, Kind, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.profiles.profile import Fingerprint, Profile, fingerprint
from adaskip_fx.runtime.runtime import Runtime
from tests.support.eager_reference import Oracle, assert_close

VOCABULARY = 61
KINDS: tuple[Kind, ...] = ("attention", "ffn")  # of a layer, in order
#: Relative errors allowed against the oracle: the same operations in the same order in float32;
#: bfloat16 keeps 8 bits of each value, and a few layers add up a few such roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _shape(layers: int, heads: int, kv_heads: int, hidden: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        **more,
    }


SHAPES = MappingProxyType(
    {
        "one_layer": _shape(1, 2, 1, 16),
        "equal_heads": _shape(1, 4, 4, 32),
        "grouped": _shape(2, 4, 2, 32),
        "one_kv_head": _shape(2, 4, 1, 32),
        "tied": _shape(1, 2, 2, 16, tie_word_embeddings=True),
        "biased": _shape(2, 4, 2, 32, attention_bias=True, mlp_bias=True),
        "own_head_dim": _shape(1, 2, 1, 24, head_dim=20),
        "eight_heads": _shape(1, 8, 2, 64),
        "odd": _shape(2, 3, 3, 24, intermediate_size=40, vocab_size=53),
        "llama3_rope": _shape(1, 4, 2, 32, rope_parameters=_LLAMA3),
        "three_layers": _shape(3, 4, 2, 32),
        "four_layers": _shape(4, 2, 1, 16),
    }
)


@dataclass(frozen=True)
class Cell:
    """A model of the bank and how it is used; each costs captures of its own.

    keep: logits to ask for: of all tokens (0), or of the last (1), whose prompt graph is captured
        by `build` anyway.
    """

    shape: str
    dtype: torch.dtype = torch.float32
    batch: int = 1
    keep: int = 1

    def entry(self) -> Entry:
        return entry(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.shape}-{str(self.dtype).removeprefix('torch.')}-{self.batch}"


_ALL_LOGITS = ("one_layer", "grouped", "three_layers")
CELLS = (
    *(Cell(name, keep=0 if name in _ALL_LOGITS else 1) for name in SHAPES),
    Cell("grouped", batch=2, keep=0),
    Cell("one_layer", batch=3),
    Cell("biased", torch.bfloat16),
)
#: Cells of `make test`: layers, heads, batches and dtypes that differ; the others are near these.
OFTEN = tuple(
    cell
    for cell in CELLS
    if str(cell)
    in (
        *("grouped-float32-1", "odd-float32-1", "three_layers-float32-1"),
        *("grouped-float32-2", "biased-bfloat16-1"),
    )
)
#: What property tests draw from; more of them take captures, not only examples.
DRAWN = CELLS if settings().max_examples > 20 else OFTEN


def make_model(shape: str = "grouped", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A new model with weights so large that every sublayer matters to the output."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 600,
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **SHAPES[shape],
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


@dataclass(frozen=True, eq=False)
class Entry:
    """A model, the same model compiled with the eager inner backend, and its oracle."""

    model: Any
    compiled: Any
    oracle: Oracle

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = runtime_of(self.compiled)
        return runtime

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        layers = range(self.model.config.num_hidden_layers)
        return tuple(Sublayer(layer, kind) for layer in layers for kind in KINDS)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.model.dtype]

    def plan(
        self,
        skip: Sequence[str] = (),
        decode_extra: Sequence[str] = (),
        factors: dict[str, float] | None = None,
    ) -> SkipPlan:
        return SkipPlan.of(
            self.sublayers, skip, decode_extra=decode_extra, surrogates=scales(factors)
        )

    @contextmanager
    def using(
        self, plan: SkipPlan | None = None, policy: Any = None, profile: Profile | None = None
    ) -> Iterator[Any]:
        """The compiled model with another plan (None: the empty one); the oracle follows it."""
        runtime, oracle = self.runtime, self.oracle
        before = runtime.plan, runtime.policy, runtime.profile
        runtime.plan = plan = plan or SkipPlan.empty(self.sublayers)
        runtime.policy, runtime.profile = policy, profile
        follow(oracle, plan)
        try:
            yield self.compiled
        finally:
            runtime.plan, runtime.policy, runtime.profile = before
            oracle.behave({})

    @contextmanager
    def probing(self, plan: SkipPlan) -> Iterator[list[torch.Tensor]]:
        """Have steps measure everything that runs; yields their readings [probed, batch, 5]."""
        runner: Any = self.runtime.runner
        run, readings = runner.run, []
        signature = inspect.signature(run)

        def probed_run(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            given = signature.bind(*args, **kwargs).arguments
            phase = "decode" if given["phase"] == "decode" else "prefill"
            runs = (s for s in plan.sublayers if plan.action(phase, s) is Action.RUN)
            logits, moments = run(**{**given, "probed": tuple(runs)})
            readings.append(moments)
            return logits, None

        runner.run = probed_run
        try:
            yield readings
        finally:
            del runner.run

    def tokens(self, batch: int, count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.model.config.vocab_size, (batch, count), generator=generator)

    def reference_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)


class _LazyEntry(Entry):
    """An entry that is compiled at its first use, so a test file can name it at its top."""

    def __init__(self, model: Any) -> None:
        vars(self).update(model=model, oracle=Oracle(model))

    @functools.cached_property
    def compiled(self) -> Any:
        compiled = build(self.model, None, backend="eager")
        assert compiled.adaskip.sublayers == self.sublayers
        return compiled


@functools.cache
def entry(shape: str = "grouped", dtype: torch.dtype = torch.float32) -> Entry:
    """The bank's one entry of this shape."""
    return _LazyEntry(make_model(shape, dtype))


def follow(oracle: Oracle, plan: SkipPlan) -> None:
    """Have the oracle do what a plan says."""
    phases = (
        {str(s): a.value for s, a in actions.items()} for actions in (plan.prefill, plan.decode)
    )
    factors = {str(s): f for s, f in plan.surrogates.factors.items()}
    oracle.behave(*phases, factors)


def scales(factors: dict[str, float] | None) -> Surrogates:
    if not factors:
        return Surrogates()
    return Surrogates.scale({Sublayer.parse(name): f for name, f in factors.items()})


def profile_of(
    model_entry: Entry, similarity: dict[str, float], scale: dict[str, float] | None = None
) -> Profile:
    """A profile with these similarities and scales (default 1), as if from one token."""
    known = scale or {}
    rows = [
        (similarity[str(s)], r := known.get(str(s), 1.0), 1.0, r * r, 1.0)
        for s in model_entry.sublayers
    ]
    model = getattr(model_entry, "model", None)  # of made-up sublayers there is none
    nobody = Fingerprint("0" * 16, "llama", 1, "0" * 16)
    of_model = nobody if model is None else fingerprint(model)
    return Profile(model_entry.sublayers, np.array([rows]), of_model, {}, {})


def stored(cache: SkipCache) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Keys and values [B, H, length, D] of each layer; None where nothing is stored."""
    return [
        None if k is None or v is None else (k[:, :, : cache.length], v[:, :, : cache.length])
        for k, v in zip(cache.keys, cache.values, strict=True)
    ]


def assert_same_cache(
    model_entry: Entry, plan: SkipPlan, cache: SkipCache, reference: DynamicCache
) -> None:
    """Every layer that has K/V has the oracle's; a layer whose attention is skipped has none."""
    assert cache.get_seq_length() == reference.get_seq_length()
    held, regions = 0, 0
    for layer, kept in enumerate(stored(cache)):
        skipped = plan.action("prefill", Sublayer(layer, "attention")) is Action.SKIP
        assert (kept is None) == skipped, f"layer {layer}: storage {kept is not None}"
        if kept is not None:
            expected = reference.layers[layer]
            what = f"layer {layer}"
            assert_close(kept[0], expected.keys, model_entry.tolerance, f"{what} keys")
            assert_close(kept[1], expected.values, model_entry.tolerance, f"{what} values")
            rows, heads, _, dim = kept[0].shape
            held += 2 * rows * heads * cache.capacity * dim * kept[0].element_size()
            regions += 2
    buffers = cache.lease.buffers
    in_place = buffers is not None and buffers.memory is not None
    blocks = regions * 2 * 2**20 if in_place else 0  # a GPU maps memory in blocks
    assert held <= cache.nbytes <= held + blocks, f"{cache.nbytes} bytes for {held}"


def check_request(
    model_entry: Entry,
    plan: SkipPlan,
    steps: Sequence[int],
    *,
    batch: int = 1,
    seed: int = 0,
    keep: int = 0,
) -> SkipCache:
    """Run a request, `steps` tokens at a time, beside the oracle; AssertionError on a difference.

    The oracle is told the plan by `Entry.using`, or something else by a test that wants to fail.
    """
    compiled, oracle = model_entry.compiled, model_entry.oracle
    cache, reference = model_entry.runtime.new_cache(), model_entry.reference_cache()
    for number, count in enumerate(steps):
        ids = model_entry.tokens(batch, count, seed + number)
        with torch.no_grad():
            logits = compiled(input_ids=ids, past_key_values=cache, logits_to_keep=keep).logits
        expected = oracle.step(ids, reference)[:, -keep:]
        what = f"logits of step {number} ({count} tokens)"
        assert_close(logits, expected, model_entry.tolerance, what)
        assert_same_cache(model_entry, plan, cache, reference)
    return cache


# What hypothesis draws -------------------------------------------------------------------------


def fewer(times: int) -> settings:
    """For examples that take long: 2 x `times` fewer than the profile says, but at least two."""
    return settings(max_examples=max(2, settings().max_examples // (2 * times)))


SEEDS = st.integers(0, 2**16)


#: A prompt, then single tokens and chunks. (A prompt of one token is a graph of its own.)
STEPS = st.tuples(
    st.integers(2, 14), st.lists(st.one_of(st.just(1), st.integers(1, 9)), max_size=7)
).map(lambda drawn: (drawn[0], *drawn[1]))


@functools.cache
def fixed(shape: str, dtype: torch.dtype = torch.float32) -> Entry:
    model = make_model(shape, dtype)
    options = {"backend": "eager", "static_cache": True}
    return Entry(model, build(model, None, **options), Oracle(model))
