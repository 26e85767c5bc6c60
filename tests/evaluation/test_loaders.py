"""Tasks that read files: what is made of them, and what is said of files that are not right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from adaskip_fx.evaluation.examples import Choose, Generate
from adaskip_fx.evaluation.json_records import read_records
from adaskip_fx.evaluation.scoring import score
from adaskip_fx.evaluation.tasks import TASKS, KeyValue, MultiDocumentQA, Summary, Trec, TriviaQA
from adaskip_fx.evaluation.tasks.trec import LABELS, read_labels
from tests.support.toy_models import encoded, knows, says, tokenizer


def lines(path: Path, *records: Any) -> Path:
    """A .jsonl file, gzipped if its name says so."""
    text = "".join(json.dumps(r) + "\n" for r in records)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def text_of(example: Any) -> str:
    text: str = tokenizer().decode(example.prompt)
    return text


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "dev.label"
    asked = ["LOC:city Where is Caf\xe9 X ?", "HUM:ind Who is Y ?", "NUM:date When was Z ?"]
    file.write_bytes("\n".join(asked).encode("latin-1"))
    return file


# TREC ------------------------------------------------------------------------------------------


def test_trec_shows_other_questions_and_asks_one(labels: Path) -> None:
    examples = Trec(path=labels, length=400, samples=3).examples(tokenizer())
    assert {e.right for e in examples} == {list(LABELS).index(k) for k in ("LOC", "HUM", "NUM")}
    for example in examples:
        text = text_of(example)
        assert text.count("Question: ") == 3
        *shown, asked = text.split("\n\n")
        assert asked.endswith("\nType:")
        assert len(set(shown)) == 2
        assert all(s.split("Type: ")[1] in LABELS.values() for s in shown)
        assert not any(asked.removesuffix("Type:") in s for s in shown)
        assert [tokenizer().decode(o) for o in example.options] == [
            f" {label}" for label in LABELS.values()
        ]


def test_trec_shows_what_fits_of_another_file(labels: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.label"
    train.write_text("\n".join(f"DESC:def What is {i} ?" for i in range(100)))
    (example,) = Trec(path=labels, train=train, length=200, samples=1).examples(tokenizer())
    assert 1 < text_of(example).count("Type: description") < 6
    assert len(example.prompt) <= 200


def test_trec_scores_move(labels: Path) -> None:
    examples = Trec(path=labels, length=200).examples(tokenizer())
    sure = knows(*(e.prompt + e.options[e.right] for e in examples))
    assert [score(sure, tokenizer(), e).score for e in examples] == [1, 1, 1]
    assert score(says("?"), tokenizer(), examples[0]).score in (0, 1)  # a guess
    wrong = knows(*(e.prompt + e.options[(e.right + 1) % 6] for e in examples))
    assert [score(wrong, tokenizer(), e).score for e in examples] == [0, 0, 0]


def test_labels_are_latin_1_and_checked(labels: Path) -> None:
    assert read_labels(labels)[0] == ("LOC", "Where is Caf\xe9 X ?")
    labels.write_text("LOC:city Where ?\nLOC no\nODD:x What ?\n")
    with pytest.raises(ValueError, match="line 3 is not `COARSE:fine question` with a type of"):
        read_labels(labels)
    labels.write_text("")
    with pytest.raises(ValueError, match="no question in it"):
        read_labels(labels)


# Questions on passages -------------------------------------------------------------------------


def _passages(tmp_path: Path, count: int = 6) -> Path:
    file = tmp_path / "passages.json"
    made = [
        {
            "input": f"Passage:\nText {i} {'x' * 10 * i}\nQuestion:\nWhich {i}\nAnswer:\n",
            "answers": [f"number {i}", f"{i}"],
        }
        for i in range(count)
    ]
    file.write_text(json.dumps(made))
    return file


def test_trivia_shows_answered_ones_and_asks_one(tmp_path: Path) -> None:
    task = TriviaQA(path=_passages(tmp_path), length=250, samples=4)
    examples = task.examples(tokenizer())
    assert len(examples) == 4
    assert task.examples(tokenizer()) == examples
    for example in examples:
        *shown, asked = text_of(example).split("\n\n")
        assert len(example.prompt) <= 250
        assert shown
        assert asked.endswith("Answer:")
        assert all("Answer: number" in s for s in shown)
        number = example.answers[1]
        assert f"Which {number}\n" in asked
        assert not any(f"Which {number}\n" in s for s in shown)
        right = knows(example.prompt + encoded(f" Number {number}.\nPassage"))
        assert score(right, tokenizer(), example).score == 1
        assert score(says("x"), tokenizer(), example).score == 0


def test_trivia_leaves_out_passages_that_are_too_long(tmp_path: Path) -> None:
    path = _passages(tmp_path)
    (one,) = TriviaQA(path=path, length=45).examples(tokenizer())
    assert "Which 0" in text_of(one)
    with pytest.raises(ValueError, match=r"no passage has at most 20 tokens; raise length"):
        TriviaQA(path=path, length=20).examples(tokenizer())


def _questions(tmp_path: Path) -> Path:
    def record(i: int) -> dict[str, Any]:
        gold = {"title": f"Title {i}", "text": f"Text {i}.", "isgold": True}
        return {"question": f"which one is {i}", "answers": [f"A{i}"], "ctxs": [gold]}

    return lines(tmp_path / "nq.jsonl.gz", *map(record, range(30)))


def test_documents_hide_the_right_one_among_others(tmp_path: Path) -> None:
    task = MultiDocumentQA(path=_questions(tmp_path), length=500, samples=5)
    examples = task.examples(tokenizer())
    places = []
    for example in examples:
        text, number = text_of(example), example.answers[0][1:]
        assert f"Question: which one is {number}?" in text
        assert text.count(f"Title {number}\n") == 1
        listed = [line.split("]")[0][1:] for line in text.splitlines() if line.startswith("[")]
        assert listed == [str(i) for i in range(1, len(listed) + 1)]
        assert len(listed) > 5
        places.append(text.index(f"Title {number}\n") / len(text))
        assert example.metric == "f1"
    assert places == sorted(places)
    loose = MultiDocumentQA(path=_questions(tmp_path), length=500, score="contains")
    assert loose.metric == loose.examples(tokenizer())[0].metric == "contains"
    with pytest.raises(ValueError, match="score must be 'f1' or 'contains', got 'bleu'"):
        MultiDocumentQA(score="bleu")


def test_pairs_of_a_file(tmp_path: Path) -> None:
    pairs = [[f"key{i}", f"value{i}"] for i in range(50)]
    record = {"ordered_kv_records": pairs, "key": "key7", "value": "value7"}
    path = lines(tmp_path / "kv.jsonl.gz", record, {**record, "key": "key9", "value": "value9"})
    for number, example in zip(
        "79", KeyValue(path=path, length=600).examples(tokenizer()), strict=True
    ):
        text = text_of(example)
        assert f'"key{number}": "value{number}"' in text
        assert text.endswith(f'The value of "key{number}" is')
        assert isinstance(example, Generate)
        assert example.answers == (f'"value{number}"',)
    lines(path, record, {**record, "value": "other"})
    with pytest.raises(ValueError, match="record 2 should have its key and value among its pairs"):
        KeyValue(path=path).examples(tokenizer())
    lines(path, {"key": "a"})
    with pytest.raises(ValueError, match="record 1 should have ordered_kv_records, key and value"):
        KeyValue(path=path).examples(tokenizer())


def test_summaries(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    text = " ".join(f"word{i}" for i in range(100))
    path = lines(tmp_path / "news.jsonl", {"text": text, "summary": "many words"})
    (example,) = Summary(path=path, length=200).examples(tokenizer())
    assert text_of(example).startswith("word0 word1 ")
    assert text_of(example).endswith("\n\nSummarize the text above.")
    assert len(example.prompt) <= 200
    assert score(knows(example.prompt + encoded("Many words.")), tokenizer(), example).score == 1
    assert score(says("x"), tokenizer(), example).score == 0


# Files that are not right ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trec", "trivia", "documents", "summary"])
def test_a_task_says_which_file_it_needs(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} reads a file: give --data {name}=PATH, "):
        TASKS[name]().examples(tokenizer())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b"[]", r"expected JSON objects, one a line \(.jsonl\) or a list of them"),
        ("a.json", b'{"a": 1}', "expected JSON objects"),
        ("a.jsonl", b'{"a": 1}\n{', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "expected JSON objects"),
        ("a.jsonl.gz", b"no gzip", "cannot be read as UTF-8 text"),
        ("a.json", b"\xff\xfe", "cannot be read as UTF-8 text"),
    ],
)
def test_files_are_checked(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(file)


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        (TriviaQA, {"answers": ["a"]}, "record 1 should have a text under 'input'"),
        (TriviaQA, {"input": "a", "answers": []}, "a text, or a list of texts, under 'answers'"),
        (MultiDocumentQA, {"question": "a", "ctxs": []}, "documents under 'ctxs'"),
        (Summary, {"text": "a", "summary": 3}, "a text, or a list of texts, under 'summary'"),
    ],
)
def test_records_are_checked(tmp_path: Path, task: Any, record: Any, message: str) -> None:
    path = lines(tmp_path / "a.jsonl", record)
    with pytest.raises(ValueError, match=message):
        task(path=path).examples(tokenizer())


def test_a_choice_is_what_trec_makes(labels: Path) -> None:
    assert all(isinstance(e, Choose) for e in Trec(path=labels).examples(tokenizer()))
