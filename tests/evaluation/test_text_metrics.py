"""Scores of texts against values worked out by hand."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from adaskip_fx.evaluation.text_metrics import (
    METRICS,
    contains,
    contains_all,
    exact,
    exact_characters,
    f1,
    first_integer,
    normalized,
    rouge_l,
)


def test_normalized_text_has_no_case_punctuation_or_articles() -> None:
    assert normalized("  The U.S.A.,\tan  answer to a-theme ") == "usa answer to atheme"
    assert normalized("A the an") == ""


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1.0),
        ("in the Eiffel Tower", ["Eiffel tower"], 0.8),  # 2 of 3 said, 2 of 2 right
        ("red red blue", ["red green"], 0.4),  # a word counts as often as both have it: 1/3, 1/2
        ("blue", ["red", "deep blue"], 2 / 3),  # the best of the answers
        ("green", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),  # nothing is left of either
    ],
)
def test_f1_by_hand(text: str, answers: list[str], expected: float) -> None:
    assert f1(text, answers) == pytest.approx(expected)


def test_exact_contains_and_contains_all() -> None:
    assert exact("The Answer!", ["answer"]) == 1
    assert exact("an answer or two", ["answer"]) == 0
    assert contains("it is 12345.", ["12345"]) == 1
    assert contains("it is 1234 5.", ["12345"]) == 0
    assert contains("PARIS it is", ["Rome", "Paris"]) == 1
    assert contains_all("ABCDE, and fghij", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"]) == 0.5


def test_exact_characters_count_punctuation_and_no_space() -> None:
    assert exact_characters(" ] )\t>\n", ["])>"]) == 1
    assert exact_characters("])>", ["x", "] ) >"]) == 1
    for wrong in ("] > )", "] )", "] ) > ]", "] ) > .", ""):
        assert exact_characters(wrong, ["] ) >"]) == 0
    assert exact("] > )", ["] ) >"]) == 1  # which sees none of them


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("124", "124", 1),
        ("124.\nand 5", "124", 1),
        ("is 124, not 5", "124", 1),
        ("5, not 124", "124", 0),  # the first one counts
        ("1240", "124", 0),
        ("24", "124", 0),
        ("-36", "-36", 1),
        ("\u221236", "-36", 1),  # a minus sign
        ("\u221236", "36", 0),
        ("36", "-36", 0),
        ("1,234,567", "1234567", 1),
        ("12,34", "12", 1),  # no thousands
        ("1,2345", "1", 1),
        ("3.5", "3", 0),
        ("x-7", "7", 1),  # minus between two things is no sign
        ("(3)-7", "-7", 0),
        ("none", "0", 0),
        ("", "0", 0),
    ],
)
def test_the_first_integer_by_hand(text: str, answer: str, expected: int) -> None:
    assert first_integer(text, [answer]) == expected
    assert first_integer(text, ["x", answer]) == expected


def test_rouge_l_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # the longest common subsequence is "police killed gunman": 3 of 4 and 3 of 4
    said, right = "police kill the gunman", "police killed a gunman"
    assert rouge_l(said, [right]) == pytest.approx(0.75)  # a stem in common
    # "the cat" of 4 and of 2: P = 2/4, R = 1
    assert rouge_l("the cat sat down", ["the cat"]) == pytest.approx(2 / 3)
    # order counts: of "a b c d" and "d c b a" one word is common in order
    assert rouge_l("alpha beta gamma delta", ["delta gamma beta alpha"]) == pytest.approx(0.25)
    assert rouge_l("nothing like it", ["delta", "it nothing"]) == pytest.approx(0.4)


def test_rouge_l_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"Run: pip install 'adaskip-fx\[eval\]'"):
        rouge_l("a", ["a"])


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"rouge_l"}))
def test_scores_move(name: str) -> None:
    """Whatever the metric: the answer itself is right, and something else is not."""
    right, wrong = ("-12", "12") if name == "first_integer" else ("blue", "green")
    assert METRICS[name](right, [right]) == 1
    assert METRICS[name](wrong, [right]) == 0
