"""vLLM's engine in this process, on CPU, with tiny models of random weights."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
os.environ.update({k: os.environ.get(k, v) for k, v in SETTINGS.items()})
PROMPT = [5, 77, 131, 9, 200, 54, 54, 18, 99, 240, 3, 61, 17, 42, 88, 150, 23, 7, 111, 66] * 2
LENGTH = 256  #: tokens of the longest request
MEMORY = 2**26  #: bytes of K/V


@contextlib.contextmanager
def engine(model: Path, plan: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An engine for a model, which follows the plan in `plan` (as `overrides` returns it).

    Nothing is compiled, not even what vLLM compiles of its sampler, unless `enforce_eager` is
    False. What was imported is frozen: vLLM collects garbage nine times for an engine.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": LENGTH,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "skip_tokenizer_init": True,
        "hf_overrides": dict(plan or {}),
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": MEMORY,
        **options,
    }
    made = None
    gc.freeze()
    try:
        stance = "force_eager" if settings["enforce_eager"] else "default"
        with torch.compiler.set_stance(stance):
            made = LLM(model=str(model), **settings)
            yield made
    finally:
        if made is not None:
            made.llm_engine.engine_core.shutdown()
        del made
        cleanup_dist_env_and_memory()  # thaws, and collects what the engine was


def generated(llm: Any, prompt: list[int], count: int) -> tuple[list[int], list[dict[int, float]]]:
    """The tokens that follow a prompt, and for each token of both but the first the five most
    probable tokens' (and its own) log-probabilities."""
    from vllm import SamplingParams

    wanted = SamplingParams(
        temperature=0.0,
        max_tokens=count,
        logprobs=5,
        prompt_logprobs=5,
        detokenize=False,
        ignore_eos=True,
    )
    result = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)[0]
    output = result.outputs[0]
    places = [*result.prompt_logprobs[1:], *output.logprobs]
    return list(output.token_ids), [{t: p.logprob for t, p in at.items()} for at in places]


def runner(llm: Any) -> Any:
    """The engine's model runner, in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def known_in_process(model: Path) -> None:
    """Have vLLM look at a model's class here, not in a process that imports all of vLLM first."""
    import json

    from vllm import ModelRegistry

    from adaskip_fx.serving.vllm_plugin import register

    names = json.loads((model / "config.json").read_text("utf-8"))["architectures"]
    for name in (*names, "TransformersForCausalLM"):
        if name in ModelRegistry.models:
            stock = ModelRegistry.models[name].load_model_cls()
            ModelRegistry.register_model(name, stock)
    register()
