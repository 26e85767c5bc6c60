"""Arithmetic and brackets: every answer is right by an oracle that reads the prompt alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from adaskip_fx.evaluation.examples import Generate
from adaskip_fx.evaluation.scoring import score
from adaskip_fx.evaluation.tasks import Arithmetic, Brackets
from adaskip_fx.evaluation.tasks.few_shot import FewShot
from tests.support.toy_models import TEMPLATE, encoded, knows, says, tokenizer

LENGTH = 2000  # one token a character
_EXPRESSION = re.compile(r"(-?\d+) ([+-]) (-?\d+) = ?(-?\d+)?")
_SEQUENCE = re.compile(r"Input: ([][(){}<> ]+) Output: ?([][(){}<> ]+)?")

_OTHER = str.maketrans(")]}>", "]}>)")


def lines_of(example: Generate) -> list[str]:
    """The solved lines, and last the one that is asked."""
    text: str = tokenizer().decode(example.prompt)
    return text.split("\n\n")[1].split("\n")


def parsed(pattern: re.Pattern[str], line: str) -> tuple[str, ...]:
    found = pattern.fullmatch(line)
    assert found is not None, line
    return tuple(group for group in found.groups() if group is not None)


def calculated(line: str) -> int:
    first, sign, second, *_ = parsed(_EXPRESSION, line)
    return int(first) + (1 if sign == "+" else -1) * int(second)


def unmatched(sequence: str) -> str:
    """What is left of a sequence when pairs that stand side by side are struck out."""
    left = "".join(sequence.split())
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", left)) != left:
        left = shorter
    return left


def test_the_oracles_know_right_from_wrong() -> None:
    assert [calculated("21 - 57 = -36"), calculated("48 + 76 =")] == [-36, 124]
    assert unmatched("( [ ] { < > } )") == ""
    assert unmatched("( [ ) ]") == "([)]"
    assert unmatched("( ) ] < ( [ ]") == "]<("


@pytest.mark.parametrize("digits", [1, 2, 5, 9])
def test_results_are_right(digits: int) -> None:
    signs, results, first = set(), list[int](), set()
    for example in Arithmetic(samples=6, length=LENGTH, digits=digits).examples(tokenizer()):
        *solved, asked = lines_of(example)
        assert len(solved) > 30
        for line in solved:
            *numbers, result = parsed(_EXPRESSION, line)
            assert calculated(line) == int(result)
            assert {len(numbers[0]), len(numbers[2])} == {digits}
            results.append(int(result))
            signs.add(numbers[1])
        assert len(parsed(_EXPRESSION, asked)) == 3  # and no result
        assert example.answers == (str(calculated(asked)),)
        first.add(asked)
    assert signs == {"+", "-"}
    assert min(results) < 0 < max(results)
    assert len(first) == 6


@pytest.mark.parametrize("unclosed", [1, 2, 4, 9])
def test_brackets_are_closed(unclosed: int) -> None:
    used, nested, opened_again = set(), 0, 0
    for example in Brackets(samples=6, length=LENGTH, unclosed=unclosed).examples(tokenizer()):
        *solved, asked = lines_of(example)
        assert len(solved) > 15
        for line in [*solved, f"{asked} {example.answers[0]}"]:
            sequence, closing = parsed(_SEQUENCE, line)
            assert unmatched(sequence + closing) == ""
            assert len(unmatched(sequence)) == len(closing.split()) == unclosed
            assert not set(unmatched(sequence)) & set(")]}>")
            assert len(sequence.split()) == 3 * unclosed
            used |= set(sequence)
            nested += bool(re.search(r"[)\]}>] [)\]}>]", sequence))
            opened_again += bool(re.search(r"[)\]}>] [(\[{<]", sequence))
        assert len(parsed(_SEQUENCE, asked)) == 1  # and nothing that closes it
    assert used == set("()[]{}<> ")
    assert opened_again > 30
    assert (nested > 30) == (unclosed > 1)


@pytest.mark.parametrize("task", [Arithmetic, Brackets])
def test_a_longer_prompt_asks_the_same_after_more(task: Any) -> None:
    for short, long in zip(
        task(samples=3, length=500).examples(tokenizer()),
        task(samples=3, length=LENGTH).examples(tokenizer()),
        strict=True,
    ):
        *few, asked = lines_of(short)
        *many, same = lines_of(long)
        assert asked == same
        assert len(few) < len(many)
        assert few == many[: len(few)]
        assert short.answers == long.answers
    # an example is the same one whatever the number of them, and whatever the chat template
    assert task(samples=1, length=500).examples(tokenizer(TEMPLATE)) == [
        task(samples=9, length=500).examples(tokenizer())[0]
    ]


def asked_of(line: str) -> Any:
    """What a line asks: a sign and two numbers in either order, or a sequence."""
    if "=" not in line:
        return parsed(_SEQUENCE, line)[0].strip()
    first, sign, second, *_ = parsed(_EXPRESSION, line)
    return sign, frozenset({first, second})


def given_away(task: Any) -> int:
    """How many solved lines ask what the last one asks."""
    every = [lines_of(e) for e in task.examples(tokenizer())]
    return sum(asked_of(line) == asked_of(asked) for *solved, asked in every for line in solved)


#: Few different questions, so that each would come up among hundreds.
FEW = (Arithmetic(samples=3, length=6000, digits=1), Brackets(samples=3, length=6000, unclosed=1))


@pytest.mark.parametrize("task", FEW, ids=lambda task: task.name)
def test_no_solved_line_gives_the_answer_away(task: Any) -> None:
    assert given_away(task) == 0


@pytest.mark.breaks
@pytest.mark.parametrize("task", FEW, ids=lambda task: task.name)
def test_it_would_be_found(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(task), "gives_away", lambda *_: False)
    assert given_away(task) > 0
    # the same question alone is left out: 8 + 6 still says what 6 + 8 is
    monkeypatch.setattr(type(task), "gives_away", FewShot.gives_away)
    assert (given_away(task) > 0) == isinstance(task, Arithmetic)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        (Arithmetic(samples=4, length=500), lambda right: str(int(right) + 1)),
        (Arithmetic(samples=4, length=500), lambda right: str(-int(right))),
        (Arithmetic(samples=4, length=500), lambda right: right + "0"),  # it goes on
        (Arithmetic(samples=4, length=500), lambda right: f"1 or {right}"),
        (Brackets(samples=4, length=500), lambda right: right[:-2]),
        (Brackets(samples=4, length=500), lambda right: right + " )"),
        (Brackets(samples=4, length=500), lambda right: right.translate(_OTHER)),
        (Brackets(samples=4, length=500), lambda right: f"the answer is {right}"),
    ],
)
def test_an_answer_is_right_or_wrong(task: FewShot, wrong: Callable[[str], str]) -> None:
    for example in task.examples(tokenizer()):
        (right,) = example.answers
        for said, expected in ((right, 1), (f"{right}\nand so on", 1), (wrong(right), 0)):
            model = knows(example.prompt + encoded(f" {said}"))
            assert score(model, tokenizer(), example).score == expected, said
        assert score(says("("), tokenizer(), example).score == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arithmetic(digits=0), "arithmetic: digits must be from 1 to 9, got 0"),
        (lambda: Arithmetic(digits=10), "arithmetic: digits must be from 1 to 9, got 10"),
        (lambda: Arithmetic(digits=2.0), "arithmetic: digits must be from 1 to 9, got 2.0"),  # type: ignore[arg-type]
        (lambda: Arithmetic(length=0), "arithmetic: length must be at least 1, got 0"),
        (lambda: Brackets(unclosed=0), "brackets: unclosed must be at least 1, got 0"),
        (lambda: Brackets(unclosed="4"), "brackets: unclosed must be at least 1, got '4'"),  # type: ignore[arg-type]
        (lambda: Brackets(samples=0), "brackets: samples must be at least 1, got 0"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        make()


def test_a_sequence_that_is_too_long_is_refused() -> None:
    message = r"a prompt of the task brackets has at least \d+ tokens, more than the 500 allowed; "
    with pytest.raises(ValueError, match=message):
        Brackets(samples=1, length=500, unclosed=100).examples(tokenizer())
