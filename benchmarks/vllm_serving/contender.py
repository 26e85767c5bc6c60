"""One engine, timed in its own process: ``python -m benchmarks.vllm_serving.contender JSON``."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.policies.adaskip import skip_count
from adaskip_fx.serving.overrides import overrides

from ..conditions import spread
from ..models import LLAMA_8B

#: name -> alpha and what part of the layers sees a window alone
PLANS = {
    "alpha 1.0": (1.0, 0.0),
    "alpha 1.2": (1.2, 0.0),
    "alpha 1.333": (4 / 3, 0.0),
    "half of the layers windowed": (1.0, 0.5),
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's steps are timed here
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Load:
    """What the engine is asked.

    Attributes:
        requests: How many come at once.
        prompt: Tokens of each.
        generated: Tokens written for each.
        window: Tokens that windowed layers see.
        layers: Of the model.
        rounds: How often all of it is timed.
        dtype: Of the weights.
    """

    requests: int
    prompt: int
    generated: int
    window: int
    layers: int
    rounds: int
    dtype: str


def save_model(folder: Path) -> Load:
    """Save a configuration (weights are made in the engine), and return what suits the device."""
    import torch
    from transformers import LlamaConfig

    on_gpu = torch.cuda.is_available()
    shape: dict[str, Any] = LLAMA_8B if on_gpu else SMALL
    config = LlamaConfig(**shape, eos_token_id=None, pad_token_id=None)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    layers = int(shape["num_hidden_layers"])
    if on_gpu:
        return Load(64, 8192, 128, 1024, layers, 3, "bfloat16")
    return Load(16, 512, 16, 128, layers, 5, "float32")


def plan(name: str, load: Load) -> SkipPlan | None:
    """The plan of a contender; None of stock vLLM. What it skips is spread over the layers."""
    if name == "stock":
        return None
    alpha, windowed = PLANS[name]
    sublayers = [Sublayer(i, k) for i in range(load.layers) for k in ("attention", "ffn")]
    count = skip_count(alpha, len(sublayers))
    inner = sublayers[2:-2]  # the first and the last layer run
    skipped = [inner[i * len(inner) // count] for i in range(count)] if count else []
    layers = [i for i in range(load.layers) if i % 2] if windowed else []
    windows = Windows.of([Sublayer(i, "attention") for i in layers], Window(load.window, 0))
    factors = Surrogates.scale(dict.fromkeys(skipped, 1.01))
    return SkipPlan.of(sublayers, skipped, surrogates=factors, windows=windows)


def timed(name: str, folder: Path, load: Load) -> dict[str, Any]:
    """One contender's row."""
    import torch
    from vllm import LLM
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    chosen = plan(name, load)
    length = load.prompt + load.generated
    llm = LLM(
        model=str(folder / "model"),
        load_format="dummy",
        dtype=load.dtype,
        max_model_len=length,
        enforce_eager=not torch.cuda.is_available(),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        hf_overrides=overrides(chosen, folder) if chosen is not None else {},
    )
    engine = llm.llm_engine
    runner = engine.model_executor.driver_worker.worker.model_runner
    room = get_max_concurrency_for_kv_cache_config(engine.vllm_config, runner.kv_cache_config)
    _round(engine, load, "warm")
    rounds = [_round(engine, load, str(i)) for i in range(load.rounds)]
    return {
        "plan": name,
        "skipped": len(chosen.prefill) if chosen is not None else 0,
        "requests_per_second": spread([load.requests / total for total, _ in rounds]),
        "first_token_seconds": spread([first for _, first in rounds]),
        "room": room,
    }


def _round(engine: Any, load: Load, name: str) -> tuple[float, float]:
    """Seconds until all requests are answered, and until a request's first token (the median)."""
    from vllm import SamplingParams

    wanted = SamplingParams(
        temperature=0.0, max_tokens=load.generated, ignore_eos=True, detokenize=False
    )
    for i in range(load.requests):
        tokens = [(7 * j + 13 * i) % 2000 for j in range(load.prompt)]
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": tokens}, wanted)
    first: dict[str, float] = {}
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - start)
    return time.perf_counter() - start, statistics.median(first.values())


if __name__ == "__main__":
    os.environ.update({k: os.environ.get(k, v) for k, v in _SETTINGS.items()})
    call = json.loads(sys.argv[1])
    row = timed(call["name"], Path(call["folder"]), Load(**call["load"]))
    print(f"RESULT {json.dumps(row)}", flush=True)
