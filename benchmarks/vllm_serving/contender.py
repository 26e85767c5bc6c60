"""One engine in its own process: ``python -m benchmarks.vllm_serving.contender JSON``.

It prints what is known of it, then a round for each line that it reads.
"""

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
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Load:
    """What the engine is asked.

    Attributes:
        requests: How many come at once.
        prompt: Tokens of each.
        generated: Tokens written for each.
        window: Tokens that windowed layers see.
        step: Tokens of a step at most; longer prompts are read in parts.
        layers: Of the model.
        rounds: How often all of it is timed.
        dtype: Of the weights.
    """

    requests: int
    prompt: int
    generated: int
    window: int
    step: int
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
        return Load(64, 8192, 128, 1024, 2048, layers, 3, "bfloat16")
    return Load(4, 1024, 16, 128, 256, layers, 18, "float32")


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


def started(chosen: SkipPlan | None, folder: Path, load: Load) -> Any:
    """An engine that follows the plan."""
    import torch
    from vllm import LLM

    on_gpu = torch.cuda.is_available()
    return LLM(
        model=str(folder / "model"),
        load_format="dummy",
        dtype=load.dtype,
        max_model_len=load.prompt + load.generated,
        max_num_batched_tokens=load.step,
        enforce_eager=not on_gpu,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        hf_overrides=overrides(chosen, folder) if chosen is not None else {},
        **({} if on_gpu else {"kv_cache_memory_bytes": 2**28}),
    ).llm_engine


def room(engine: Any) -> float:
    """For how many of the longest requests the engine has K/V."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    runner = engine.model_executor.driver_worker.worker.model_runner
    config = engine.vllm_config
    return float(get_max_concurrency_for_kv_cache_config(config, runner.kv_cache_config))


def timed(engine: Any, load: Load, name: str) -> dict[str, float]:
    """Until all requests are answered and until the first token of a request (the median), each
    in seconds and in seconds of the processor."""
    from vllm import SamplingParams

    wanted = SamplingParams(
        temperature=0.0, max_tokens=load.generated, ignore_eos=True, detokenize=False
    )
    for i in range(load.requests):
        tokens = [(7 * j + 13 * i) % 2000 for j in range(load.prompt)]
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": tokens}, wanted)
    first: dict[str, tuple[float, float]] = {}
    start = time.perf_counter(), time.process_time()

    def since() -> tuple[float, float]:
        return time.perf_counter() - start[0], time.process_time() - start[1]

    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, since())
    seconds, processor = since()
    return {
        "seconds": seconds,
        "processor": processor,
        "first_token": statistics.median(wall for wall, _ in first.values()),
        "first_token_processor": statistics.median(used for _, used in first.values()),
    }


def _say(result: dict[str, Any]) -> None:
    print(f"RESULT {json.dumps(result)}", flush=True)


def main() -> None:
    """Start the engine, and time a round for each line that is read."""
    os.environ.update({k: os.environ.get(k, v) for k, v in _SETTINGS.items()})
    call = json.loads(sys.argv[1])
    name, folder, load = call["name"], Path(call["folder"]), Load(**call["load"])
    chosen = plan(name, load)
    engine = started(chosen, folder, load)
    skipped = len(chosen.prefill) if chosen is not None else 0
    _say({"plan": name, "skipped": skipped, "room": room(engine)})
    for number, _ in enumerate(sys.stdin):
        _say(timed(engine, load, str(number)))


if __name__ == "__main__":
    main()
