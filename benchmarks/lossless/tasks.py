"""SmolLM2-135M-Instruct with drafts against its own full program, by what a text has in common.

The prompts are made of Python's own documentation and source, and of numbered records. Answers end
where the model ends them, or at a length. Times are those of a token, of each prompt the median of
some answers. In bfloat16 answers differ where two tokens are about equally good; of both it is told
how far the logits of what was written are behind the best ones, read in one piece afterwards.
"""

from __future__ import annotations

import inspect
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch

import adaskip_fx
from adaskip_fx.api import build
from adaskip_fx.data.reference_text import calibration_samples
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.model.load import load, packaged_model, usable_backend
from adaskip_fx.speculation.options import Lossless
from adaskip_fx.speculation.statistics import DraftStats

from ..ceilings import synchronize


@dataclass(frozen=True)
class Sizes:
    """How much is asked for.

    Attributes:
        context: tokens of a prompt, about.
        new: tokens of an answer at most.
        prompts: of each task.
        rounds: how often each is answered.
        calibrated: tokens of each of four texts that the drafts' plan is calibrated on.
    """

    context: int
    new: int
    prompts: int
    rounds: int
    calibrated: int


_ON_GPU = Sizes(context=2048, new=256, prompts=16, rounds=3, calibrated=1024)
_ELSEWHERE = Sizes(context=512, new=96, prompts=2, rounds=1, calibrated=256)
#: What a task is to gain at least.
TARGETS = {"quoting": 1.8, "summaries": 1.35, "edits": 2.2, "stories": 0.97}


def prompts(name: str, count: int, characters: int) -> list[str]:
    """Return prompts of a task, no two alike, the same ones every time."""
    draw = random.Random(name)
    make: dict[str, Callable[[random.Random, int], str]] = {
        "quoting": _quoting,
        "summaries": _summary,
        "edits": _edit,
        "stories": _story,
    }
    made: dict[str, None] = {}
    while len(made) < count:
        made[make[name](draw, characters)] = None
    return list(made)


def _quoting(draw: random.Random, characters: int) -> str:
    words = ("red", "green", "blue", "tall", "small", "round", "old", "new", "warm", "cold")
    records = [
        f"Record {number}: the {draw.choice(words)} box of shelf {draw.randrange(100)} holds "
        f"{draw.randrange(1000)} {draw.choice(words)} parts, last counted in {draw.randrange(12)}."
        for number in range(max(8, characters // 90))
    ]
    first = draw.randrange(len(records) - 6)
    return "\n".join(
        [*records, f"Repeat the records {first} to {first + 5} word for word, one on each line."]
    )


def _summary(draw: random.Random, characters: int) -> str:
    name = draw.choice([n for n, text in sorted(topics.items()) if len(text) > characters])
    begin = draw.randrange(0, len(topics[name]) - characters, 64)
    text = topics[name][begin : begin + characters]
    return f"{text}\n\nSummarize the text above in a few sentences."


def _edit(draw: random.Random, characters: int) -> str:
    functions = textwrap, statistics, random, inspect
    source = inspect.getsource(draw.choice(functions))
    start = draw.randrange(max(1, len(source) - characters // 2))
    code = source[start : start + characters // 2]
    return f"```python\n{code}\n```\nWrite this code again with the name `self` changed to `this`."


def _story(draw: random.Random, characters: int) -> str:
    who = ("a sailor", "two sisters", "an old clock", "a lost dog", "a young baker", "a teacher")
    who += ("a tired nurse", "three thieves", "a painter", "a boy with a kite")
    where = ("a town by the sea", "a forest in winter", "a train at night", "an empty school")
    where += ("a house on a hill", "a market", "a desert", "a library")
    return f"Write a story about {draw.choice(who)} in {draw.choice(where)}."


def rows(name: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a row for each task: the time of plain tokens over that of drafted ones.

    Args:
        name: of the model; None for SmolLM2-135M-Instruct of the installed package.
    """
    small = load(name or str(packaged_model()))
    on_gpu = small.model.device.type == "cuda"
    sizes = _ON_GPU if on_gpu else _ELSEWHERE
    backend, _ = usable_backend("inductor", small.model.device)
    texts = calibration_samples(None, sizes.calibrated, 4)
    profile = adaskip_fx.calibrate(small.model, small.tokenizer, texts, sizes.calibrated)
    plain = build(small.model, None, backend=backend)
    fast = adaskip_fx.compile(small.model, profile, decoding=Lossless(), backend=backend)
    for model in (plain, fast):
        model.adaskip.warmup(2 * sizes.context + sizes.new)
    for task, target in TARGETS.items():
        yield _row(task, target, small.tokenizer, plain, fast, sizes)


def _row(
    name: str, target: float, tokenizer: Any, plain: Any, fast: Any, sizes: Sizes
) -> dict[str, Any]:
    runtime_of(fast).speculation.stats = DraftStats()  # type: ignore[union-attr]
    times: dict[str, list[float]] = {"plain": [], "fast": []}
    behind = dict.fromkeys(times, 0.0)
    same, lengths, written = 0, 0, list[int]()
    for number, text in enumerate(prompts(name, sizes.prompts, 4 * sizes.context)):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
        )
        ids = (ids if isinstance(ids, torch.Tensor) else ids["input_ids"]).to(plain.device)
        taken: dict[str, list[float]] = {kind: [] for kind in times}
        for _ in range(sizes.rounds + (number == 0)):
            answers = {}
            for kind, model in (("plain", plain), ("fast", fast)):
                seconds, answers[kind] = answer(model, ids, sizes.new)
                taken[kind].append(seconds)
        for kind, seconds_of in times.items():
            seconds_of.append(statistics.median(taken[kind]))
            behind[kind] = max(behind[kind], behind_best(plain, answers[kind], ids.shape[1]))
        lengths += ids.shape[1]
        written.append(answers["plain"].shape[1] - ids.shape[1])
        same += int(torch.equal(answers["plain"], answers["fast"]))
    stats = fast.adaskip.drafts
    return {
        "what": f"{name}, {lengths // sizes.prompts} tokens: plain over drafted",
        "ratio": sum(times["plain"]) / sum(times["fast"]),
        "target": target,
        "notes": {
            "plain_ms": 1000 * statistics.fmean(times["plain"]),
            "drafted_ms": 1000 * statistics.fmean(times["fast"]),
            "new_tokens": statistics.median(written),
            "same_answers": f"{same} of {sizes.prompts}",
            **{f"{kind}_behind_best": most for kind, most in behind.items()},
            "tokens_per_step": stats.tokens_per_step,
            "acceptance": {
                n: [round(share, 3) for share in proposed.acceptance]
                for n, proposed in stats.proposers.items()
            },
        },
    }


def behind_best(model: Any, tokens: torch.Tensor, prompt: int) -> float:
    """Return by how much the logit of a token after the prompt is below the best one, at most.

    Args:
        model: a compiled one that leaves nothing out.
        tokens: int64 [1, T].
        prompt: how many of these are the prompt's.
    """
    count = tokens.shape[1] - prompt
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], logits_to_keep=count).logits.to(torch.float32)
    chosen = logits.gather(-1, tokens[:, prompt:].unsqueeze(-1)).squeeze(-1)
    return float((logits.amax(-1) - chosen).max())


def answer(model: Any, ids: torch.Tensor, new: int) -> tuple[float, torch.Tensor]:
    """Return the seconds of a token after the first, and all tokens: `new` of them at most."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    began: list[float] = []

    class First:
        """Takes the time at which the first new token comes."""

        def put(self, value: torch.Tensor) -> None:
            began.append(time.perf_counter())

        def end(self) -> None:
            began.append(time.perf_counter())

    tokens: torch.Tensor = model.generate(ids, streamer=First(), max_new_tokens=new, **options)
    synchronize(model.device)
    after = tokens.shape[1] - ids.shape[1] - 1
    return (began[-1] - began[1]) / max(1, after), tokens  # what comes first is the prompt
