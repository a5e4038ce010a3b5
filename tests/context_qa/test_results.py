"""The format of results: rows, and the summary that stands beside them."""

import json

import pytest

from context_qa.results import (
    FIELDS,
    Answer,
    articles_by_idx,
    read_results,
    read_summary,
    result_row,
    summary_path,
)
from squad_utils import NO_ANSWER, Example

BO = Example("q7", "Bo is\u2028a “cat”.", "What is Bo?", ("a cat", "small cat"))
UNKNOWN = Example("q8", "Bo is a cat.", "Who is Ann?", ())


def answer(text: str) -> Answer:
    return Answer(text, 0.5, 0.25, seconds=0.5, num_tokens=140, num_new_tokens=3)


def test_a_row_in_the_documented_order():
    expected = {
        "idx": 3,
        "id": "q7",
        "context": BO.context,
        "question": BO.question,
        "answer": "a cat",
        "answers": ["a cat", "small cat"],
        "guess": "The Small Cat!",
        "is_correct": False,
        "exact_match": 1.0,
        "f1": 1.0,
        "confidence": 0.5,
        "no_answer_probability": 0.25,
        "time": 0.5,
        "num_tokens": 140,
        "num_new_tokens": 3,
        "tokens_per_sec": 6.0,
    }
    row = result_row(3, BO, answer("The Small Cat!"))
    assert list(row.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("example", "guess", "is_correct", "exact_match", "f1"),
    [
        (BO, "A CAT ", True, 1.0, 1.0),
        (BO, "cat", False, 1.0, 1.0),  # exact match is normalised, is_correct is raw
        (BO, "small dog", False, 0.0, 0.5),
        (BO, NO_ANSWER, False, 0.0, 0.0),
        (UNKNOWN, NO_ANSWER, True, 1.0, 1.0),
        (UNKNOWN, "I dont know", False, 1.0, 1.0),
        (UNKNOWN, "cat", False, 0.0, 0.0),
    ],
)
def test_scores_of_a_row(example, guess, is_correct, exact_match, f1):
    row = result_row(0, example, answer(guess))
    assert (row["is_correct"], row["exact_match"], row["f1"]) == (is_correct, exact_match, f1)
    assert row["answer"] == (NO_ANSWER if example is UNKNOWN else "a cat")


def test_rows_read_back(tmp_path):
    """A baseline's too, which has no probabilities; bad lines: tests/test_query_results.py."""
    path = tmp_path / "results.jsonl"
    baseline = Answer("Bo", None, None, seconds=0.5, num_tokens=14, num_new_tokens=1)
    rows = [result_row(0, BO, answer("x\ny\u2028“z”")), result_row(1, UNKNOWN, baseline)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert read_results(str(path)) == rows
    assert [list(row) for row in rows] == [list(FIELDS)] * 2


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "\xff"])
def test_a_summary_that_cannot_be_read_is_empty(tmp_path, content):
    if content is not None:
        summary_path(tmp_path / "a.jsonl").write_text(content, "latin-1")
    assert read_summary(tmp_path / "a.jsonl") == {}


def test_articles_are_run_lengths():
    summary = {"articles": [["Oslo", 2], [None, 1], ["Rome", 1]]}
    assert articles_by_idx(summary) == {0: "Oslo", 1: "Oslo", 3: "Rome"}
    assert articles_by_idx({}) == {}
