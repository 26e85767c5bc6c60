"""A value of a JSON object with random keys (Liu et al., Lost in the Middle, arXiv 2307.03172)."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from adaskip_fx.evaluation.examples import Example, Tokens
from adaskip_fx.evaluation.json_records import invalid_record, read_records
from adaskip_fx.evaluation.prompts import ask, longest_prompt, message
from adaskip_fx.evaluation.task import TaskOptions

Pair: TypeAlias = tuple[str, str]

_MOST = 2000  # pairs that are drawn for one example
_INSTRUCTION = "Find the value of a key in this JSON object.\n\n"


@dataclass(frozen=True, kw_only=True)
class KeyValue(TaskOptions):
    """As many pairs as fit, one of which is asked for.

    Attributes:
        path: a ``.jsonl`` or ``.jsonl.gz`` with ``ordered_kv_records``, ``key`` and ``value`` on
            every line, as Lost in the Middle has it; None for drawn pairs.
        forced: score the answer's tokens, given those before, in one pass; else generate.
    """

    name: ClassVar[str] = "key_value"
    metric: ClassVar[str] = "accuracy"
    path: Path | None = None
    forced: bool = False

    def examples(self, tokenizer: Any) -> Sequence[Example]:
        """Return one object each; where the pair is goes deeper from example to example."""
        if self.path is None:
            drawn = [_drawn(self.rng(i)) for i in range(self.samples)]
        else:
            records = read_records(self.path)[: self.samples]
            drawn = [_recorded(self.path, number, r) for number, r in enumerate(records, 1)]
        return [self._example(tokenizer, i, *pairs) for i, pairs in enumerate(drawn)]

    def _example(
        self, tokenizer: Any, number: int, wanted: Pair, others: Sequence[Pair]
    ) -> Example:
        key, value = wanted
        question = f'\n\nWhat is the value of the key "{key}"? Answer with the value.'
        opening = f'The value of "{key}" is'

        def text(count: int) -> str:
            at = round(self.depth(number) * count)
            pairs = [*others[:at], wanted, *others[at:count]]
            return _INSTRUCTION + json.dumps(dict(pairs), indent=0) + question

        def build(count: int) -> Tokens:
            return message(tokenizer, text(count), opening)

        count, prompt = longest_prompt(build, len(others), self.length, self.name)
        return ask(tokenizer, prompt, text(count), opening, f'"{value}"', self.forced)


def _drawn(rng: random.Random) -> tuple[Pair, list[Pair]]:
    def random_uuid() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    first, *others = ((random_uuid(), random_uuid()) for _ in range(_MOST))
    return first, others


def _recorded(path: Path, number: int, record: dict[str, Any]) -> tuple[Pair, list[Pair]]:
    try:
        pairs = [(str(k), str(v)) for k, v in record["ordered_kv_records"]]
        wanted = (str(record["key"]), str(record["value"]))
    except (KeyError, TypeError, ValueError) as error:
        raise invalid_record(path, number, "ordered_kv_records, key and value") from error
    if wanted not in pairs:
        raise invalid_record(path, number, "its key and value among its pairs")
    return wanted, [p for p in pairs if p != wanted]
