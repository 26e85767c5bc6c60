"""The tasks, one file for each or for a few of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaskip_fx.evaluation.task import TaskOptions

from .counting import CommonWords, FrequentWords
from .documents import MultiDocumentQA
from .key_value import KeyValue
from .needles import MultiKeyNeedle, Needle
from .passkey import Passkey
from .perplexity import Perplexity
from .summary import Summary
from .tracking import VariableTracking
from .trec import Trec
from .trivia import TriviaQA

__all__ = [
    "TASKS",
    "CommonWords",
    "FrequentWords",
    "KeyValue",
    "MultiDocumentQA",
    "MultiKeyNeedle",
    "Needle",
    "Passkey",
    "Perplexity",
    "Summary",
    "Trec",
    "TriviaQA",
    "VariableTracking",
]

#: By the name on the command line.
TASKS: Mapping[str, type[TaskOptions]] = MappingProxyType(
    {
        task.name: task
        for task in (
            Perplexity,
            Passkey,
            Needle,
            MultiKeyNeedle,
            VariableTracking,
            CommonWords,
            FrequentWords,
            KeyValue,
            Trec,
            TriviaQA,
            MultiDocumentQA,
            Summary,
        )
    }
)
