"""The tasks, one file for each or for a few of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from adaskip_fx.evaluation.task import TaskOptions

from .arithmetic import Arithmetic
from .brackets import Brackets
from .counting import CommonWords, FrequentWords
from .documents import MultiDocumentQA
from .key_value import KeyValue
from .needles import MultiKeyNeedle, Needle
from .own_summary import OwnSummary
from .passkey import Passkey
from .perplexity import DecodePerplexity, Perplexity
from .summary import Summary
from .tracking import VariableTracking
from .trec import Trec
from .trivia import TriviaQA

__all__ = [
    "TASKS",
    "Arithmetic",
    "Brackets",
    "CommonWords",
    "DecodePerplexity",
    "FrequentWords",
    "KeyValue",
    "MultiDocumentQA",
    "MultiKeyNeedle",
    "Needle",
    "OwnSummary",
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
            DecodePerplexity,
            Passkey,
            Needle,
            MultiKeyNeedle,
            VariableTracking,
            CommonWords,
            FrequentWords,
            KeyValue,
            Arithmetic,
            Brackets,
            Trec,
            TriviaQA,
            MultiDocumentQA,
            Summary,
            OwnSummary,
        )
    }
)
