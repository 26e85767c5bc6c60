"""Checks of `worker` in which each process has the whole model, and they share texts out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import adaskip_fx
from adaskip_fx import Profile, SkipPlan
from adaskip_fx.api import build
from adaskip_fx.fitting import Fitter, SurrogateSpec
from adaskip_fx.parallel.replicas import Replicas
from tests.distributed.failures import told
from tests.support.eager_reference import moments, plain_streams

_SIZES = {
    **{"vocab_size": 98, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
}
TEXTS = ("a", "bb" * 9, "ccc", "dd" * 4, "eeeee")  # of 17, 34, 19, 24 and 21 tokens
_CALIBRATE = importlib.import_module("adaskip_fx.calibration.calibrate")
_FITTER = importlib.import_module("adaskip_fx.fitting.fitter")


class Tokenizer:
    """Ids drawn by the length of the text, the longer the more."""

    name_or_path = "drawn"

    def __call__(self, text: str, **_options: Any) -> dict[str, torch.Tensor]:
        drawn = torch.Generator().manual_seed(len(text))
        return {"input_ids": torch.randint(1, 98, (1, 16 + len(text)), generator=drawn)}


class Short:
    """Too few ids, as if this process had read another file."""

    def __call__(self, _text: str, **_options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.ones(1, 3, dtype=torch.int64)}


class Measured:
    """Counts the texts that this process measures, and fails at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.count, self._fails_at = 0, fails_at
        self._own = _CALIBRATE.measure_prompt

    def __enter__(self) -> Measured:
        _CALIBRATE.measure_prompt = self
        return self

    def __exit__(self, *_error: object) -> None:
        _CALIBRATE.measure_prompt = self._own

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        self.count += 1
        if self.count == self._fails_at:
            raise torch.OutOfMemoryError("the device is full")
        found: torch.Tensor = self._own(*args, **options)
        return found


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Compile a model once for all that is done with it meanwhile."""
    once = functools.cache(build)
    for module in (_CALIBRATE, _FITTER):
        module.build = once
    try:
        yield
    finally:
        for module in (_CALIBRATE, _FITTER):
            module.build = build


def calibrated(
    model: Any, texts: Sequence[str] = TEXTS, tokenizer: Any = None, **options: Any
) -> Profile:
    options = {"data_parallel": True, **options}
    return adaskip_fx.calibrate(model, tokenizer or Tokenizer(), texts, 64, **options)


def distance(found: SkipPlan, expected: SkipPlan) -> float:
    """How far the numbers of two plans' surrogates are apart at most."""
    return max(
        float(abs(found.surrogates.by_sublayer[s].tensors[name] - tensor).max())
        for s, surrogate in expected.surrogates.by_sublayer.items()
        for name, tensor in surrogate.tensors.items()
    )


def replicas(shared: Any) -> Any:
    """All that processes do which share texts out."""
    whole = model()
    with compiled_once():
        return {
            "calibrated": _calibrated(whole),
            "unlike": _unlike(shared, whole),
            "failing": _failing(shared, whole),
            "fitted": _fitted(whole),
        }


def _calibrated(whole: Any) -> Any:
    """A profile of texts that were shared out, beside one process' and sums in float64 by hand."""
    steps = list[tuple[int, int]]()
    alone = calibrated(whole, data_parallel=False)
    with Measured() as measured:
        found = calibrated(whole, progress=lambda done, total: steps.append((done, total)))
    streams = (plain_streams(whole, Tokenizer()(text)["input_ids"]).values() for text in TEXTS)
    return {
        "statistics": found.statistics.tolist(),
        "alone": alone.statistics.tolist(),
        "by hand": [[moments(*stream)[0].tolist() for stream in of] for of in streams],
        "digests": [found.digest, alone.digest],
        "measured": measured.count,
        "progress": steps,
    }


def _unlike(shared: Any, whole: Any) -> Any:
    """What processes are told that have other models or texts, or cannot share any."""
    rank = shared.rank
    return {
        "models": told(lambda: calibrated(model(rank)))["text"],
        "texts": told(lambda: calibrated(whole, TEXTS[rank:]))["text"],
        "spread": told(lambda: calibrated(shared.llamas[1]))["text"],
    }


def _failing(shared: Any, whole: Any) -> Any:
    """What processes are told of which one cannot read its texts, or fails at its second one."""
    read = told(lambda: calibrated(whole, tokenizer=Short() if shared.rank else None))
    with Measured(fails_at=2 if shared.rank else None) as measured:
        device = told(lambda: calibrated(whole))
    return {
        "texts": read,
        "device": device,
        "measured": measured.count,
        "goes on": told(lambda: calibrated(whole))["text"],
    }


def _fitted(whole: Any) -> Any:
    """Surrogates fitted to texts that were shared out, and their sums, beside one process'."""
    texts = (*TEXTS, "f" * 6, "g" * 7)  # the sixth and seventh are in the folds of the first ones
    alone = Fitter(whole, Tokenizer(), texts, max_length=64)
    both = Fitter(whole, Tokenizer(), texts, max_length=64, data_parallel=True)
    plan = SkipPlan.of(alone.runtime.sublayers, ["0.ffn", "1.attention"])
    errors, digests = dict[str, float](), list[str]()
    for kind in ("scale", "diagonal", "linear"):
        spec: Any = SurrogateSpec(kind, ridge=1e-3 if kind == "linear" else None)  # type: ignore[arg-type]
        found, expected = (fitter.fit(plan, spec) for fitter in (both, alone))
        digests.append(found.digest)
        errors[kind] = distance(found, expected)
    wanted = list(expected.surrogates.by_sublayer)
    sums = [f.second_moments(expected.surrogates, (), wanted, spec) for f in (both, alone)]
    pairs = [(mine, own) for s in wanted for mine, own in zip(sums[0][s], sums[1][s], strict=True)]
    return {
        "errors": errors,
        "digests": digests,
        "tokens": [[mine.tokens, own.tokens] for mine, own in pairs],
        "sums": max(
            float((a - b).abs().max() / b.abs().max())
            for mine, own in pairs
            for a, b in zip(mine.tensors[:3], own.tensors[:3], strict=True)
        ),
    }


def two_by_two(_shared: Any) -> Any:
    """Four processes: a model that two hold together, twice; its texts are shared out.

    Where one of the four fails, the other that holds a part of its model waits in a collective.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tp"))
    alone, spread = model(), model()
    apply_tensor_parallelism(spread, mesh["tp"], spread._expand_parallel_plan(spread.tp_plan))
    group = mesh["replicas"].get_group()
    expected = calibrated(alone, data_parallel=False)
    with Measured() as measured:
        found = calibrated(spread, data_parallel=group)
    fitter = Fitter(spread, Tokenizer(), TEXTS, max_length=64, data_parallel=group)
    plan = SkipPlan.of(fitter.runtime.sublayers, ["0.ffn", "1.attention"])
    fitted = Fitter(alone, Tokenizer(), TEXTS, max_length=64).fit(plan)
    return {
        "sharded": type(spread.model.layers[0].mlp.up_proj.weight).__name__,
        "statistics": found.statistics.tolist(),
        "alone": expected.statistics.tolist(),
        "measured": measured.count,
        "fitted": distance(fitter.fit(plan), fitted),
    }


def one_gone(shared: Any) -> Any:
    """A process ends while texts are shared out."""
    all_of_them = Replicas(dist.group.WORLD)
    if shared.rank == 1:
        os._exit(7)
    return told(lambda: all_of_them.share("a text", [1, 1, 1], lambda index: index))


CHECKS: dict[str, Callable[[Any], Any]] = {
    check.__name__: check for check in (replicas, two_by_two, one_gone)
}
