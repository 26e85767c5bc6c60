"""Small models on a CPU beside transformers: eager, and compiled with a static cache.

Times are those of the processor, on one thread, so that what else the machine does counts little.
The contenders take turns, and a ratio is the median of those of single turns. A compiled model of
transformers' has prompts of one length and steps; what it would compile again for, or makes masks
for beforehand, has no such contender.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from adaskip_fx.api import build
from adaskip_fx.model.load import usable_backend

_SHAPE = {
    **{"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048},
    "max_position_embeddings": 4096,
}
#: What families' configs say besides.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 256, "query_pre_attn_scalar": 32},
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2},
}
TARGET = 1.05  # of the better of the others
_PROMPT, _TURN, _NEW, _ROWS, _ROUNDS, _STEPS = 256, 16, 16, 4, 9, 8

#: What a contender runs in one turn; returns seconds.
Turn = Callable[[], float]


def measure(only: Sequence[str] = ()) -> dict[str, Any]:
    """Return a row for each family and situation; each is printed as it comes.

    Args:
        only: names of families; all of them when empty.
    """
    rows = []
    with _one_thread(), torch.inference_mode():
        for name in FAMILIES:
            if not only or name in only:
                for row in _rows(name):
                    print(line(row), file=sys.stderr, flush=True)
                    rows.append(row)
    return {"rows": rows, "threads": 1}


def line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of text."""
    times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
    met = "yes" if row["ratio"] <= TARGET else "NO"
    return f"{row['family']:10s} {row['what']:32s} {row['ratio']:.2f} (aim {TARGET}) {met}  {times}"


def summary(result: Mapping[str, Any]) -> str:
    """Return the rows as lines."""
    return "\n".join(map(line, result["rows"]))


def _rows(name: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"))
    config = AutoConfig.for_model(name, **{**_SHAPE, **FAMILIES[name], **ends})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.requires_grad_(False)
    backend, _ = usable_backend("inductor", torch.device("cpu"))
    fast = build(model, None, backend=backend)
    _check(model, fast)
    for what, contenders in _situations(model, fast):
        yield {"family": name, "what": what, **_compared(contenders)}


def _check(model: Any, fast: Any) -> None:
    """Refuse to time what is wrong."""
    ids = _tokens(2, 40)
    got, want = fast(input_ids=ids).logits, model(input_ids=ids).logits
    error = float((got - want).norm() / want.norm())
    if error > 1e-4:
        raise RuntimeError(f"logits are off by {error:.1e}")


def _compared(contenders: Mapping[str, Turn]) -> dict[str, Any]:
    """Return the median of what ours takes over the better of the others, and all times."""
    for run in contenders.values():  # compiles, and fills what is kept
        run(), run()
    rounds = [{name: run() for name, run in contenders.items()} for _ in range(_ROUNDS)]
    times = {name: statistics.median(r[name] for r in rounds) for name in contenders}
    best = min((name for name in times if name != "ours"), key=lambda name: times[name])
    ratio = statistics.median(r["ours"] / r[best] for r in rounds)
    return {"ratio": ratio, "beside": best, "ms": {n: 1000 * t for n, t in times.items()}}


def _situations(model: Any, fast: Any) -> Iterator[tuple[str, dict[str, Turn]]]:
    ids = _tokens(1, _PROMPT)
    static = _Compiled(model)
    yield (
        f"prompt of {_PROMPT}",
        {
            "ours": lambda: _seconds(lambda: _filled(fast, ids)),
            "eager": lambda: _seconds(lambda: _filled(model, ids)),
            "compiled": lambda: _seconds(lambda: static.prompt(ids)),
        },
    )
    yield (
        f"step at {_PROMPT}",
        {**_both(model, fast, _steps, ids), "compiled": lambda: static.steps(ids)},
    )
    rows = _tokens(_ROWS, _PROMPT)
    mask = torch.ones_like(rows)
    for row in range(_ROWS):
        mask[row, : row * _PROMPT // _ROWS] = 0
    padded = functools.partial(_steps, mask=mask)
    yield f"step of {_ROWS} padded rows", _both(model, fast, padded, rows)
    yield f"turn of {_TURN} on {_PROMPT}", _both(model, fast, _turn, ids)
    yield f"generate, {_NEW} tokens", _both(model, fast, _generated, ids)


def _both(model: Any, fast: Any, turn: Callable[[Any, torch.Tensor], float], ids: Any) -> Any:
    return {"ours": lambda: turn(fast, ids), "eager": lambda: turn(model, ids)}


def _tokens(rows: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, _SHAPE["vocab_size"], (rows, count), generator=draw, device="cpu")


def _seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _filled(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    cache = model.adaskip.new_cache() if hasattr(model, "adaskip") else None
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(input_ids=ids, past_key_values=cache, attention_mask=mask, logits_to_keep=1)
    return cache


def _steps(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Return the seconds of a step."""
    cache, token = _filled(model, ids, mask), ids[:, :1].clone()
    masks = [mask] * _STEPS
    for i in range(_STEPS if mask is not None else 0):
        masks[i] = torch.nn.functional.pad(mask, (0, i + 1), value=1)

    def run() -> None:
        for grown in masks:
            model(input_ids=token, past_key_values=cache, attention_mask=grown)

    return _seconds(run) / _STEPS


def _turn(model: Any, ids: torch.Tensor) -> float:
    cache, more = _filled(model, ids), _tokens(1, _TURN)
    return _seconds(lambda: model(input_ids=more, past_key_values=cache, logits_to_keep=1))


def _generated(model: Any, ids: torch.Tensor) -> float:
    mask = torch.ones_like(ids)
    given = {"do_sample": False, "max_new_tokens": _NEW, "min_new_tokens": _NEW}
    return _seconds(lambda: model.generate(ids, attention_mask=mask, **given))


class _Compiled:
    """The model as transformers compiles it, with its static cache."""

    def __init__(self, model: Any) -> None:
        torch._dynamo.reset()
        self._call = torch.compile(model)
        length = _PROMPT + 128
        self._cache = StaticCache(config=model.config, max_cache_len=length)

    def prompt(self, ids: torch.Tensor) -> None:
        """Read a prompt into the emptied cache."""
        self._cache.reset()
        self._call(input_ids=ids, past_key_values=self._cache, logits_to_keep=1)

    def steps(self, ids: torch.Tensor) -> float:
        """Return the seconds of a step after a prompt."""
        self.prompt(ids)
        token = ids[:, :1].clone()

        def run() -> None:
            for _ in range(_STEPS):
                self._call(input_ids=token, past_key_values=self._cache, logits_to_keep=1)

        return _seconds(run) / _STEPS


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
