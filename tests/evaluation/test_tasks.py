"""What generators make: seeded, within their length, the answer there and only one of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adaskip_fx.data.reference_text import halves
from adaskip_fx.evaluation.evaluate import digest
from adaskip_fx.evaluation.examples import Example, Generate, Predict, Recall
from adaskip_fx.evaluation.haystack import hide, paragraphs, words
from adaskip_fx.evaluation.prompts import continuation, longest_prompt
from adaskip_fx.evaluation.tasks import (
    Arithmetic,
    Brackets,
    CommonWords,
    DecodePerplexity,
    FrequentWords,
    KeyValue,
    MultiKeyNeedle,
    Needle,
    Passkey,
    Perplexity,
    VariableTracking,
)
from tests.support.toy_models import TEMPLATE, encoded, tokenizer

MESSAGES: tuple[Any, ...] = (
    Passkey,
    Needle,
    MultiKeyNeedle,
    VariableTracking,
    CommonWords,
    FrequentWords,
    KeyValue,
)
GENERATED = (*MESSAGES, Arithmetic, Brackets)
LENGTH = 3000  # one token a character


def text_of(example: Example) -> str:
    assert not isinstance(example, Predict)
    text: str = tokenizer().decode(example.prompt)
    return text


def answer_of(example: Example) -> str:
    if isinstance(example, Recall):
        text: str = tokenizer().decode(example.answer)
        return text.strip()
    assert isinstance(example, Generate)
    return example.answers[0]


@pytest.mark.parametrize("task", GENERATED)
def test_examples_are_seeded_and_within_their_length(task: Any) -> None:
    examples = task(samples=3, length=LENGTH).examples(tokenizer())
    assert len(examples) == 3
    for example in examples:
        assert 0.8 * LENGTH < len(example.prompt) <= LENGTH  # and most of it is used
    assert task(samples=3, length=LENGTH).examples(tokenizer()) == examples
    assert len({digest([e]) for e in examples}) == 3
    others = task(samples=3, length=LENGTH, seed=1).examples(tokenizer())
    assert not {digest([e]) for e in examples} & {digest([e]) for e in others}


@pytest.mark.parametrize("task", MESSAGES)
def test_a_chat_template_is_used_and_counts(task: Any) -> None:
    (example,) = task(samples=1, length=LENGTH).examples(tokenizer(TEMPLATE))
    assert len(example.prompt) <= LENGTH
    assert tokenizer().decode(example.prompt).startswith("<user>")


@pytest.mark.parametrize("task", GENERATED)
def test_too_short_a_length_is_refused(task: Any) -> None:
    with pytest.raises(ValueError, match=r"has at least \d+ tokens, more than the 30 allowed; "):
        task(samples=1, length=30).examples(tokenizer())
    with pytest.raises(ValueError, match=f"{task.name}: samples must be at least 1, got 0"):
        task(samples=0)


def test_a_passkey_is_there_once_and_deeper_from_one_to_the_next() -> None:
    examples = Passkey(samples=4, length=LENGTH).examples(tokenizer())
    places = []
    for example in examples:
        text, key = text_of(example), answer_of(example)
        assert isinstance(example, Recall)
        assert re.fullmatch(r"\d{5}", key)
        assert text.count(f"The secret number is {key}.") == 1
        assert text.count(key) == 2
        assert text.endswith("The secret number is")
        places.append(text.index(key) / len(text))
    assert places == sorted(places)
    assert places[0] < 0.35 < 0.6 < places[-1]
    asked = Passkey(samples=1, length=LENGTH, forced=False).examples(tokenizer())
    assert isinstance(asked[0], Generate)
    assert answer_of(asked[0]) == answer_of(
        Passkey(samples=1, length=LENGTH).examples(tokenizer())[0]
    )


def test_one_needle_is_asked_for_among_others() -> None:
    for count, task in ((1, Needle), (4, MultiKeyNeedle)):
        for example in task(samples=3, length=LENGTH).examples(tokenizer()):
            text, number = text_of(example), answer_of(example)
            hidden = re.findall(r"The locker number of (\w+) is (\d{7})\.", text)
            assert len(dict(hidden)) == len(hidden) == count
            assert text.count(number) == 1
            (word,) = (w for w, n in hidden if n == number)
            assert text.endswith(f"The locker number of {word} is")


def test_variables_follow_from_the_asked_value_alone() -> None:
    task = VariableTracking(samples=3, length=LENGTH, chains=3, hops=4)
    for example in task.examples(tokenizer()):
        text = text_of(example)
        assigned = re.findall(r"VAR (\w{5}) = (\w{5})\n", text)
        assert len(assigned) == len(dict(assigned)) == 15
        (value,) = re.findall(r"variables have the value (\d{5})", text)
        known = {value}
        for name, source in assigned:  # in order: nothing is used before it is assigned
            assert source.isdigit() or source in dict(assigned)
            if source in known:
                known.add(name)
        assert isinstance(example, Generate)
        assert known - {value} == set(example.answers)
        assert len(example.answers) == 5


def test_common_words_are_the_most_common() -> None:
    task = CommonWords(samples=3, length=LENGTH, common=4, often=6, seldom=2)
    for example in task.examples(tokenizer()):
        listed = Counter(re.findall(r"\d+\. (\w+)", text_of(example)))
        top = listed.most_common(4)
        assert isinstance(example, Generate)
        assert {w for w, _ in top} == set(example.answers)
        assert {n for _, n in top} == {6}
        assert {n for w, n in listed.items() if w not in example.answers} == {2}


@pytest.mark.parametrize("length", [300, LENGTH])
def test_frequent_words_are_the_most_frequent(length: int) -> None:
    for example in FrequentWords(samples=3, length=length).examples(tokenizer()):
        assert isinstance(example, Generate)
        body = text_of(example).split("\n\n")[1]
        found = Counter(re.findall(r"\b[a-z]{6}\b", body)).most_common()
        assert [w for w, _ in found[:3]] == list(example.answers)
        assert found[0][1] > found[1][1] > found[2][1]
        assert len(found) < 4 or found[2][1] > found[3][1]


def test_a_key_is_unique_and_has_its_value() -> None:
    for example in KeyValue(samples=3, length=LENGTH).examples(tokenizer()):
        text = text_of(example)
        pairs = json.loads(text[text.index("{") : text.rindex("}") + 1])
        (key,) = re.findall(r'value of the key "([0-9a-f-]{36})"', text)
        assert len(pairs) > 10
        assert f'"{pairs[key]}"' == answer_of(example)
        assert text.count(key) == 3  # in the object, in the question and before the answer


def test_windows_do_not_overlap_and_begin_with_special_tokens(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    task = Perplexity(samples=3, length=100, path=file)
    examples = task.examples(tokenizer())
    ids = list(encoded(file.read_text()))
    assert [list(e.tokens) for e in examples] == [ids[s : s + 100] for s in (0, 450, 900)]
    assert len(Perplexity(length=300, path=file).examples(tokenizer())) == 3  # no more fit

    class Beginning:
        def __call__(self, text: str, **options: Any) -> Any:
            special = options.get("add_special_tokens", True)
            return {"input_ids": [1] * special + list(encoded(text))}

    (first, *_) = task.examples(Beginning())
    assert list(first.tokens) == [1, *ids[:99]]
    with pytest.raises(ValueError, match="has 1000 tokens, too few for one window of 1001"):
        Perplexity(length=1001, path=file).examples(tokenizer())


def test_texts_are_held_out_from_calibration() -> None:
    first, second = halves()
    assert set(paragraphs(None)) <= set(second)
    assert not set(paragraphs(None)) & set(first)


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one paragraph\nof two lines\n\n\n" + "long " * 400 + "\n \nlast")
    found = paragraphs(file)
    assert found[0] == "one paragraph\nof two lines"
    assert found[-1] == "last"
    assert max(map(len, found)) <= 800
    assert "".join("".join(found).split()) == "".join(file.read_text().split())
    assert words(file) == ("long",)
    (example,) = Passkey(samples=1, length=1200, path=file).examples(tokenizer())
    assert "long long" in text_of(example)
    file.write_bytes(b"caf\xe9")
    paragraphs.cache_clear()
    with pytest.raises(ValueError, match="not UTF-8 text"):
        paragraphs(file)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="no text in it"):
        paragraphs(file)


def test_fit_takes_as_much_as_fits() -> None:
    for most in range(12):
        for length in range(3, 30):
            asked: list[int] = []

            def build(count: int, asked: list[int] = asked) -> tuple[int, ...]:
                asked.append(count)
                return (0,) * (3 + 2 * count)

            count, prompt = longest_prompt(build, most, length, "x")
            assert count == min(most, (length - 3) // 2)
            assert len(prompt) == 3 + 2 * count
            assert max(asked) <= most
    with pytest.raises(ValueError, match="the task x has at least 3 tokens, more than the 2"):
        longest_prompt(lambda count: (0,) * 3, 5, 2, "x")


def test_hide_keeps_order_at_its_depths() -> None:
    assert hide(["a", "b"], ["x", "y", "z"], [1.0, 0.0, 0.9]) == "y\n\na\n\nb\n\nz\n\nx"
    assert hide([], ["x"], [0.5]) == "x"


def test_an_answer_is_tokenized_with_its_prompt_where_it_can_be() -> None:
    known = tokenizer()
    assert continuation(known, encoded("ab c"), encoded("ab"), " c") == encoded(" c")
    assert continuation(known, (9, 9, 9), encoded("ab"), " c") == encoded(" c")  # merged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiKeyNeedle(keys=1), "multikey: keys must be at least 2, got 1"),
        (lambda: VariableTracking(hops=0), "got 2 chains of 0 hops"),
        (lambda: CommonWords(seldom=9, often=9), "seldom at least 1 and below often; got 5, 9, 9"),
        (lambda: FrequentWords(vocabulary=3), "vocabulary at least 4, got 2.0 and 3"),
        (lambda: Perplexity(edges=(4, 4)), r"edges must rise from above 0, got \(4, 4\)"),
        (lambda: Perplexity(length=1), "length must be at least 2"),
        (lambda: DecodePerplexity(length=9, steps=7), "leave 3 of length 9 for the prompt, got 7"),
        (lambda: Passkey(length=0), "passkey: length must be at least 1, got 0"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
