"""Scores of an answer's text, each in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

Metric = Callable[[str, Sequence[str]], float]


def normalized(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, words one space apart.

    SQuAD does so before it compares (Rajpurkar et al., arXiv 1606.05250, section 6.1).
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def f1(text: str, answers: Sequence[str]) -> float:
    """Return the best F1 of words against any of `answers` (SQuAD), after `normalized`."""
    return max(_f1(normalized(text).split(), normalized(a).split()) for a in answers)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall)


def exact(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the text is one of `answers`, after `normalized`."""
    return float(normalized(text) in {normalized(a) for a in answers})


def exact_characters(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the text is one of `answers`, white space aside; punctuation counts."""
    return float("".join(text.split()) in {"".join(a.split()) for a in answers})


def first_integer(text: str, answers: Sequence[str]) -> float:
    """Return 1 if the first number in the text is one of `answers`; 1,234 is 1234, x-7 is 7."""
    found = _NUMBER.search(text.replace("\u2212", "-"))
    return float(found is not None and found[0].replace(",", "") in answers)


def contains(text: str, answers: Sequence[str]) -> float:
    """Return 1 if any of `answers` occurs in the text, case aside."""
    return float(any(a.lower() in text.lower() for a in answers))


def contains_all(text: str, answers: Sequence[str]) -> float:
    """Return the share of `answers` in the text, case aside (RULER, arXiv 2404.06654)."""
    return sum(a.lower() in text.lower() for a in answers) / len(answers)


def rouge_l(text: str, answers: Sequence[str]) -> float:
    """Return the best ROUGE-L F-measure against any of `answers`, by the package rouge-score.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(
            "ROUGE-L needs the package rouge-score. Run: pip install 'adaskip-fx[eval]'"
        ) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return max(float(scorer.score(a, text)["rougeL"].fmeasure) for a in answers)


#: By the name that an example gives.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "f1": f1,
        "exact": exact,
        "exact_characters": exact_characters,
        "first_integer": first_integer,
        "contains": contains,
        "contains_all": contains_all,
        "rouge_l": rouge_l,
    }
)
