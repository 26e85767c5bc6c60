"""Cold start: from a model in memory to its first prompt and token, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import models

_ONE = """
import json, sys, time
import torch
from benchmarks import models
layers, context = int(sys.argv[1]), int(sys.argv[2])
model = models.llama(num_hidden_layers=layers)
one = torch.ones(64, 64, device=model.device)
(one @ one).cpu()
ids = models.tokens(1, context)
start = time.perf_counter()
from adaskip_fx.api import build
import torch._inductor.compile_fx
marks = {"import_s": time.perf_counter() - start}
fast = build(model, None, backend="inductor")
marks["capture_s"] = time.perf_counter() - start
with torch.inference_mode():
    cache = fast.adaskip.new_cache(capacity=context + 64)
    fast(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.cpu()
    marks["prompt_s"] = time.perf_counter() - start
    for _ in range(2):
        fast(input_ids=ids[:, :1], past_key_values=cache).logits.cpu()
marks["total_s"] = time.perf_counter() - start
marks.update(pieces=runtime_of(fast).pieces_compiled, compile_s=runtime_of(fast).compile_seconds)
print("RESULT" + json.dumps(marks))
"""


def measure(layers: tuple[int, ...] | None = None, context: int | None = None) -> dict[str, Any]:
    """Seconds to capture, compile and run a first prompt and two tokens; no cache, then a warm one.

    Importing torch and transformers, making the model and initialising the device are not counted;
    importing the compiler is.
    """
    on_gpu = models.device().type == "cuda"
    layers, context = layers or ((32, 80) if on_gpu else (4,)), context or 1000
    rows = []
    for count in layers:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("none", "warm"):
                rows.append({"layers": count, "cache": cache, **_run(count, context, folder)})
    return {"context": context, "rows": rows}


def _run(layers: int, context: int, folder: str) -> dict[str, Any]:
    root = Path(__file__).parent.parent
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'passes'}",
    }
    command = [sys.executable, "-c", _ONE, str(layers), str(context)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if line is None:
        raise RuntimeError(f"the cold start failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return result
