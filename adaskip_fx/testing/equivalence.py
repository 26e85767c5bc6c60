"""Check that a compiled model computes what the eager one does; if not, say where they part."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from adaskip_fx.model.handle import runtime_of

from ..api import build
from ..kv_cache.padding import of_real_tokens
from ..model.adapted import decoder_in
from ..plans.skip_plan import Action, Phase, SkipPlan
from ..programs.instruments import ResidualRecorder
from ..runtime.oracle import Oracle, Skips
from ..runtime.runtime import Runtime

#: Relative errors allowed by default. The compiled model groups operations differently, and picks
#: other attention kernels; bfloat16 keeps 8 bits of a value, float16 11.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}


def assert_equivalent(
    model: Any,
    plan: SkipPlan | None = None,
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    decode_steps: int = 8,
    dtype: torch.dtype | None = None,
    tol: float | None = None,
    backend: str = "eager",
    modules: Mapping[str, str | Sequence[str]] | None = None,
) -> float:
    """Check that a model compiled under a plan gives the logits of the eager model under it.

    The eager model is run with hooks on the modules that end its branches (:class:`Oracle`); none
    of the graph passes is used for it. Both read the prompt and then, one by one, the tokens that
    the eager model finds likeliest. Logits of padding are not compared. A model is compiled once
    and kept for the next call.

    Args:
        model: a decoder as :func:`adaskip_fx.compile` takes it; it is left as it was.
        plan: what to leave out; nothing if None.
        inputs: ``input_ids`` [B, T] and, for padded rows, ``attention_mask`` [B, T]; 13 random
            tokens if None.
        decode_steps: tokens after the prompt.
        dtype: check a copy of the model converted to it.
        tol: the largest difference of logits allowed, in units of the largest logit of the step;
            by the model's dtype if None (see ``TOLERANCES``).
        backend: what compiles the pieces; ``"eager"`` shows rewriting alone.
        modules: for each sublayer the path of the module that ends its branch (see `Oracle`); as
            the compiler found them if None.

    Returns:
        The largest relative difference that there was.

    Raises:
        AssertionError: logits differ; the message says in which step, and the first sublayer after
            which the residual stream differs.
        UnsupportedError: the model or the plan cannot be compiled.
    """
    if plan is not None and plan.last_token_full:
        raise ValueError(
            "assert_equivalent runs a prompt as one step; check a plan with last_token_full=False"
        )
    pair = _pair(decoder_in(model), dtype, backend)
    runtime: Runtime = runtime_of(pair.compiled)
    runtime.plan = plan = plan if plan is not None else SkipPlan.empty(runtime.sublayers)
    oracle = Oracle(pair.eager, modules or runtime.graphs.structure.modules)
    oracle.prefill, oracle.decode = _skips(plan, "prefill"), _skips(plan, "decode")
    heads = runtime.graphs.structure.heads
    oracle.prefill_windows = heads(plan.windows.prefill)
    oracle.decode_windows = heads(plan.windows.decode)
    prompt = dict(inputs) if inputs is not None else {"input_ids": _random_tokens(pair.eager)}
    steps = _eager_steps(pair, oracle, prompt, decode_steps)
    allowed = tol if tol is not None else TOLERANCES[pair.eager.dtype]
    return _compare(pair, steps, allowed, f"{type(model).__name__} under plan {plan.digest[:8]}")


def _compare(pair: _Pair, steps: list[_EagerStep], allowed: float, name: str) -> float:
    """Run the steps on the compiled model; returns the largest difference there was."""
    worst, cache = 0.0, pair.compiled.adaskip.new_cache()
    for number, step in enumerate(steps):
        logits = pair.forward(pair.compiled, step.inputs, cache)
        error = relative_error(step.real(logits), step.real(step.logits))
        if not error <= allowed:
            difference = _first_difference(pair, steps[: number + 1], allowed)
            raise AssertionError(
                f"{name}: the logits of step {number} ({step.name}) differ from the eager "
                f"model's by {error:.1e}, allowed {allowed:.1e}. {difference}"
            )
        worst = max(worst, error)
    return worst


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, in units of the largest expected value; infinite for NaN.

    Raises:
        AssertionError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    wide = expected.double()
    error = (actual.double() - wide).abs().max() / wide.abs().max().clamp_min(1e-30)
    return float("inf") if bool(error.isnan()) else float(error)


def compiled_for(model: Any, dtype: torch.dtype | None = None, backend: str = "eager") -> Any:
    """Return the compiled form of a model that :func:`assert_equivalent` uses; it is made once."""
    return _pair(model, dtype, backend).compiled


@dataclass(frozen=True)
class _EagerStep:
    """One step of the eager model: inputs, logits, and the hidden states around each sublayer."""

    name: str
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    hidden: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of tokens that are none of padding."""
        mask = self.inputs.get("attention_mask")
        return of_real_tokens(logits, None if mask is None else mask[:, -logits.shape[1] :])


@dataclass(frozen=True)
class _Pair:
    """An eager model and its compiled form."""

    eager: Any
    compiled: Any

    def forward(self, model: Any, inputs: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
        """Return the logits [B, T, V] of one step of either model."""
        named = {runtime_of(self.compiled).cache_argument: cache}
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs, use_cache=True, **named).logits
        return logits


#: by model: its compiled forms, and the converted copies that they were made of
_made: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def _pair(model: Any, dtype: torch.dtype | None, backend: str) -> _Pair:
    forms = _made.setdefault(model, {})
    key = (dtype, backend)
    converted, compiled = forms.get(key, (None, None))
    source = converted if converted is not None else model
    parameters = zip(source.parameters(), compiled.parameters() if compiled else (), strict=False)
    if compiled is None or not all(a is b for a, b in parameters):
        converted = None if dtype in (None, model.dtype) else copy.deepcopy(model).to(dtype)
        source = converted if converted is not None else model
        compiled = build(source, None, backend=backend)
        forms[key] = converted, compiled  # not the model itself, which would keep it alive
    return _Pair(source, compiled)


def _skips(plan: SkipPlan, phase: Phase) -> Skips:
    """Return what a plan leaves out in a phase, for the oracle; `kv_only` adds nothing either."""
    left_out = (s for s in plan.sublayers if plan.action(phase, s) is not Action.RUN)
    return {str(s): plan.surrogates.get(s) for s in left_out}


def _random_tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (1, 13), generator=generator).to(model.device)


def _eager_steps(
    pair: _Pair, oracle: Oracle, prompt: dict[str, torch.Tensor], decode_steps: int
) -> list[_EagerStep]:
    """Run the eager model on a prompt, and on the tokens that it finds likeliest after it."""
    parameters = inspect.signature(type(pair.eager).forward).parameters
    ids, mask = prompt["input_ids"], prompt.get("attention_mask")
    valid = mask if mask is not None else torch.ones_like(ids)
    cache, steps = DynamicCache(config=pair.eager.config.get_text_config()), list[_EagerStep]()
    with oracle.watching():
        for number in range(1 + decode_steps):
            inputs = {"input_ids": ids}
            if mask is not None:
                inputs["attention_mask"] = valid
            if "position_ids" in parameters:
                positions = (valid.cumsum(-1) - 1).clamp_min(0)
                inputs["position_ids"] = positions[:, -ids.shape[1] :]
            logits = pair.forward(pair.eager, inputs, cache)
            name = f"decode, token {number}" if number else f"prefill, {ids.shape[1]} tokens"
            steps.append(_EagerStep(name, inputs, logits, oracle.streams))
            ids = logits[:, -1:].argmax(-1)
            valid = torch.cat((valid, torch.ones_like(ids)), 1)
    return steps


def _first_difference(pair: _Pair, steps: list[_EagerStep], allowed: float) -> str:
    """Run the steps again with the compiled model's hidden states recorded; say where they part."""
    runtime: Runtime = runtime_of(pair.compiled)
    modules = runtime.graphs.structure.modules
    recorder = ResidualRecorder()
    cache = runtime.new_cache(instrument=recorder)
    for number, step in enumerate(steps):
        logits = pair.forward(pair.compiled, step.inputs, cache)
        begin, *afters = recorder.streams
        for name, before, after in zip(modules, (begin, *afters), afters, strict=False):
            expected = [t.reshape(after.shape) for t in step.hidden[name]]
            where = f"{name} ({', '.join(modules[name])}), step {number} ({step.name})"
            for got, want, side in zip((before, after), expected, _SIDES, strict=True):
                if not relative_error(got, want) <= allowed:
                    difference = f"the residual stream {side} {where}: {_worst(got, want)}"
                    return f"First difference: {difference}."
        if not relative_error(step.real(logits), step.real(step.logits)) <= allowed:
            return "The residual stream is right after each sublayer; what follows differs."
    return "With its hidden states recorded, the compiled model gives the eager model's logits."


_SIDES = ("before", "after")


def _worst(got: torch.Tensor, want: torch.Tensor) -> str:
    """Return where two tensors differ most, and by how much."""
    error = relative_error(got, want)
    wide = (got.double() - want.double()).abs()
    at = torch.unravel_index(torch.where(wide.isnan(), torch.inf, wide).argmax(), wide.shape)
    index = [int(i) for i in at]
    actual, expected = (float(t[tuple(index)]) for t in (got, want))
    return f"relative error {error:.1e}, at {index} {actual:.6g} instead of {expected:.6g}"
