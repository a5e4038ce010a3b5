"""The results file: its rows, what it refuses, and the summary beside it."""

import argparse
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from context_qa.answering import Answer
from context_qa.provenance import sha256
from context_qa.results import ResultsFile, print_scores, result_row
from errors import UserError
from squad_utils import NO_ANSWER, Example

BO = Example("q7", "Bo is\u2028a “cat”.", "What is Bo?", ("a cat", "small cat"))
UNKNOWN = Example("q8", "Bo is a cat.", "Who is Ann?", ())


def answer(text: str) -> Answer:
    return Answer(text, 0.5, 0.25, seconds=0.5, num_tokens=140, num_new_tokens=3)


def write(path: Path, *rows: dict, overwrite: bool = False) -> None:
    with ResultsFile(str(path), overwrite) as results:
        results.write(rows)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


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


def test_rows_are_on_disk_after_each_write_one_a_line(tmp_path):
    path = tmp_path / "new" / "folder" / "results.jsonl"
    rows = [result_row(idx, BO, answer("x\ny\u2028“z”")) for idx in range(3)]
    with ResultsFile(str(path)) as results:
        results.write(rows[:2])
        assert read(path) == rows[:2]
        results.write(rows[2:])
        assert read(path) == rows
    assert "“z”" in path.read_text("utf-8")  # for a reader's eyes, not escaped


def test_existing_results_are_kept_unless_told_to_overwrite(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, {"idx": 0})
    with pytest.raises(UserError, match=r"results\.jsonl: holds results already; .*--overwrite"):
        ResultsFile(str(path))
    assert read(path) == [{"idx": 0}]
    write(path, {"idx": 1}, overwrite=True)
    assert read(path) == [{"idx": 1}]


def test_no_summary_of_other_results_is_left(tmp_path):
    summary = tmp_path / "results.jsonl.summary.json"
    write(tmp_path / "results.jsonl", {"idx": 0})
    summary.write_text("{}")
    write(tmp_path / "results.jsonl", {"idx": 1}, overwrite=True)
    assert not summary.exists()


def test_overwriting_waits_for_the_first_row(tmp_path):
    path = tmp_path / "results.jsonl"
    write(path, {"idx": 0}, {"idx": 1})
    with ResultsFile(str(path), overwrite=True) as results:
        assert read(path) == [{"idx": 0}, {"idx": 1}]
        results.write([{"idx": 2}])
        assert read(path) == [{"idx": 2}]


def test_an_empty_file_is_no_results(tmp_path):
    (tmp_path / "results.jsonl").touch()
    write(tmp_path / "results.jsonl", {"idx": 0})
    assert read(tmp_path / "results.jsonl") == [{"idx": 0}]


@pytest.mark.parametrize(
    "output", [".", "file/results.jsonl", "file/deeper/results.jsonl", "a" * 300]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_cannot_be_written_is_told_at_once(tmp_path, output, overwrite):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError) as caught:
        ResultsFile(str(tmp_path / output), overwrite)
    assert str(tmp_path / output) in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_summary_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "results.jsonl.summary.json").mkdir()
    with pytest.raises(UserError, match=r"summary\.json: cannot be written \(a folder\)"):
        ResultsFile(str(tmp_path / "results.jsonl"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told_in_one_line():
    with pytest.raises(UserError, match="/dev/full: cannot be written"):
        write(Path("/dev/full"), {"idx": 0})


@pytest.fixture
def summary(tmp_path) -> dict:
    """Of four rows: two answerable, one of them right; two unanswerable, both right."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    data.write_text("{}")
    guesses = [(BO, "cat"), (BO, "small dog"), (UNKNOWN, NO_ANSWER), (UNKNOWN, "I dont know")]
    rows = [result_row(idx, one, answer(guess)) for idx, (one, guess) in enumerate(guesses)]
    args = argparse.Namespace(model=str(model), data=str(data), batch_size=32, limit=None)
    path = tmp_path / "results.jsonl"
    with ResultsFile(str(path)) as results:
        results.write(rows[:1])
        results.write(rows[1:])
        returned = results.summarize(args, "cpu")
    written = json.loads((tmp_path / "results.jsonl.summary.json").read_text())
    assert returned == written
    return written


def test_summary_scores(summary):
    assert summary["scores"] == {
        "exact_match": 75.0,
        "f1": 87.5,
        "is_correct": 25.0,
        "num_questions": 4,
        "has_answer_exact_match": 50.0,
        "has_answer_f1": 75.0,
        "has_answer_is_correct": 0.0,
        "has_answer_num_questions": 2,
        "no_answer_exact_match": 100.0,
        "no_answer_f1": 100.0,
        "no_answer_is_correct": 50.0,
        "no_answer_num_questions": 2,
    }


def test_summary_says_what_the_results_were_made_with(summary, tmp_path):
    assert summary["arguments"] == {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "data.jsonl"),
        "batch_size": 32,
        "limit": None,
    }
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", summary["git_commit"] or "0" * 40)
    assert summary["packages"]["torch"] == metadata.version("torch")
    assert summary["model_sha256"] == sha256(str(tmp_path / "model" / "model.safetensors"))
    assert summary["data_sha256"] == sha256(str(tmp_path / "data.jsonl"))
    assert summary["model_sha256"] != summary["data_sha256"]
    assert summary["device"] == "cpu"
    assert 0 <= summary["wall_seconds"] < 60
    assert 2**24 < summary["peak_memory_bytes"] < 2**40  # in bytes: a Python with torch in it


def test_printed_scores(capsys):
    print_scores({"exact_match": 75.0, "no_answer_f1": 100.0, "num_questions": 4})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["exact", "match", "75.00", "%"],
        ["no", "answer", "f1", "100.00", "%"],
        ["num", "questions", "4"],
    ]
