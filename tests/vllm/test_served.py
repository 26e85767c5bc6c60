"""Plans in processes of their own: `vllm serve` under many clients, and tensor parallelism."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from tests.vllm import models, reference
from tests.vllm.engines import LENGTH, MEMORY, PROMPT

SUBLAYERS = [Sublayer(i, k) for i in range(models.LAYERS) for k in ("attention", "ffn")]
FACTORS = {Sublayer(1, "attention"): 0.8, Sublayer(2, "ffn"): 1.3}
PLAN = SkipPlan.of(SUBLAYERS, FACTORS, surrogates=Surrogates.scale(FACTORS))
INSTEAD = {str(s): reference.scale(f) for s, f in FACTORS.items()}
CLIENTS, TOKENS, START = 16, 12, 500  # the last: seconds that a server may take to begin
EAGER = {"TORCH_COMPILE_DISABLE": "1"}  # vLLM compiles parts of its sampler and embeddings always


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What the reference writes behind a prompt, under the plan."""
    tokens = list(prompt)
    for _ in range(TOKENS):
        found = reference.log_probabilities(model, tokens, INSTEAD)
        tokens.append(int(found[-1].argmax()))
    return tokens[len(prompt) :]


def exported(folder: Path) -> str:
    """What the command prints for the plan."""
    PLAN.save(folder / "plan.json")
    command = [sys.executable, "-m", "adaskip_fx", "export", "--vllm", str(folder / "plan.json")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def server(folders: models.Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that follows the plan."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", str(LENGTH)]
    options += ["--dtype", "float32", "--enforce-eager", "--hf-overrides", exported(folder)]
    # What `vllm serve` runs; the CPU package's own command looks for a package called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folders["llama"])]
    command += ["--kv-cache-memory-bytes", str(MEMORY)]
    environment = {**os.environ, **EAGER, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = folder / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, *options, "--served-model-name", "planned"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        _wait(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import httpx

    until = time.monotonic() + START
    while time.monotonic() < until:
        try:
            process.wait(1)
            break
        except subprocess.TimeoutExpired:
            pass  # it lives
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # it does not listen yet
    pytest.fail(f"the server did not begin: {log.read_text('utf-8')[-3000:]}")


async def _streamed(client: Any, url: str, prompt: list[int]) -> list[str]:
    """The pieces of text that one client is sent."""
    body = {"model": "planned", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "skip_special_tokens": False}
    pieces = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    return pieces


def test_many_clients_at_once_get_what_the_plan_says(server: str, folders: models.Folders) -> None:
    import httpx

    prompts = [[3 + (17 * i + 5 * j) % 250 for j in range(9 + i)] for i in range(CLIENTS)]

    async def all_of_them() -> list[list[str]]:
        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(_streamed(client, server, p) for p in prompts))

    answers = asyncio.run(all_of_them())
    model = folders.reference("llama")
    wanted = [greedy(model, prompt) for prompt in prompts]
    assert [[int(w[1:]) for w in "".join(a).split()] for a in answers] == wanted
    assert all(len(pieces) > TOKENS // 2 for pieces in answers)  # it was a stream
    plain = reference.log_probabilities(model, prompts[0])
    assert int(plain[-1].argmax()) != wanted[0][0] or len({tuple(w) for w in wanted}) > 8


_TWO = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from tests.vllm.engines import known_in_process

if __name__ == "__main__":
    model, given, prompt, count, length, memory = json.loads(sys.argv[1])
    known_in_process(Path(model))
    llm = LLM(model=model, dtype="float32", max_model_len=length, enforce_eager=True,
              tensor_parallel_size=2, skip_tokenizer_init=True, hf_overrides=given,
              kv_cache_memory_bytes=memory)
    wanted = SamplingParams(temperature=0.0, max_tokens=count, detokenize=False, ignore_eos=True)
    result = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
    print("TOKENS", json.dumps(list(result[0].outputs[0].token_ids)), flush=True)
"""


def test_two_ranks_compute_what_one_does(folders: models.Folders, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    given = json.loads(exported(tmp_path))
    call = json.dumps([str(folders["llama"]), given, PROMPT, TOKENS, LENGTH, MEMORY])
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), call],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **EAGER, **binding},
        timeout=START,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    assert found, done.stderr[-3000:]
    with torch.no_grad():
        assert json.loads(found[0][6:]) == greedy(folders.reference("llama"), PROMPT)
