"""Put an example to a model: greedy generation, or one pass with the right tokens given."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch

from ..kv_cache.argument_names import cache_argument
from .examples import Choose, Generate, Predict, Recall, Tokens
from .text_metrics import METRICS


@dataclass(frozen=True)
class Outcome:
    """A model's score on one example.

    Attributes:
        score: in [0, 1].
        text: what it generated; None where nothing was.
    """

    score: float
    text: str | None = None


def score(model: Any, tokenizer: Any, example: Generate | Recall | Choose) -> Outcome:
    """Return one example's outcome."""
    match example:
        case Generate():
            text = generated(model, tokenizer, example)
            return Outcome(METRICS[example.metric](text, example.answers), text)
        case Recall():
            return Outcome(recalled(model, example))
        case Choose():
            return Outcome(float(chosen(model, example) == example.right))
        case _:
            assert_never(example)


def generated(model: Any, tokenizer: Any, example: Generate) -> str:
    """Return the greedy answer's text, up to where it stops."""
    ids = _row(model, example.prompt)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=example.limit,
        do_sample=False,
    )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    text = text.strip()
    return text.split(example.stop, 1)[0] if example.stop else text


def recalled(model: Any, example: Recall) -> float:
    """Return 1 if each token of the answer is the likeliest one, given those before it."""
    logits = _logits_before(model, example.prompt, example.answer)
    right = torch.tensor(example.answer, device=logits.device)
    return float((logits.argmax(-1) == right).all())


def chosen(model: Any, example: Choose) -> int:
    """Return the index of the likeliest option (not normalized by its length)."""
    options = example.options
    passes = {o[:-1]: o for o in options if len(o) > 1} or {(): options[0]}
    logits = {before: _logits_before(model, example.prompt, o) for before, o in passes.items()}
    # An option of one token needs no pass of its own: any begins with the prompt.
    first = next(iter(logits.values()))
    values = [_likelihood(logits.get(option[:-1], first), option) for option in options]
    return max(range(len(values)), key=values.__getitem__)


def _likelihood(logits: torch.Tensor, option: Tokens) -> float:
    places = range(len(option))
    known = torch.log_softmax(logits[: len(option)].float(), -1)
    return float(known[list(places), list(option)].sum())


def _logits_before(model: Any, prompt: Tokens, answer: Tokens) -> torch.Tensor:
    """Return the logits [answer, V] that predict each token of `answer` from those before it."""
    return logits_of(model, (*prompt, *answer[:-1]), len(answer))[-len(answer) :]


@torch.no_grad()
def logits_of(model: Any, tokens: Sequence[int], keep: int = 0) -> torch.Tensor:
    """Return the logits [kept, V] of a sequence: of its last `keep` tokens, or of all (0)."""
    more = {"logits_to_keep": keep} if _can_keep(model) else {}
    output = model(input_ids=_row(model, tokens), use_cache=False, **more)
    logits: torch.Tensor = output.logits[0]
    return logits


@torch.no_grad()
def stepped_logits(model: Any, tokens: Sequence[int], steps: int) -> torch.Tensor:
    """Return the logits [steps, V] that predict the last `steps` tokens, one decode step for each.

    The right token is fed at every step, whatever the model would have said.
    """
    cache = cache_argument(model.forward)
    more = {"logits_to_keep": 1} if _can_keep(model) else {}
    output = model(input_ids=_row(model, tokens[: -steps - 1]), use_cache=True, **more)
    rows = []
    for token in tokens[-steps - 1 : -1]:
        kept = {cache: getattr(output, cache)}
        output = model(input_ids=_row(model, [token]), use_cache=True, **kept)
        rows.append(output.logits[0, -1])
    return torch.stack(rows)


def predictions(model: Any, example: Predict) -> tuple[Tokens, torch.Tensor]:
    """Return tokens, and the logits that predict all of them but the first."""
    if not example.steps:
        return example.tokens, logits_of(model, example.tokens)[:-1]
    logits = stepped_logits(model, example.tokens, example.steps)
    return example.tokens[-example.steps - 1 :], logits


def _can_keep(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _row(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64, device=model.device)
