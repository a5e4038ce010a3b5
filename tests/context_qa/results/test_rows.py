"""The format of results: rows, those of older layouts, and the summary beside them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from common.errors import UserError
from context_qa.results import reading, rows
from context_qa.results.reading import read_objects, read_results, results_rows
from context_qa.results.rows import COLUMNS, About, Answer, ResultRow, columns_of, result_row
from context_qa.results.summary import articles_by_idx, incompleteness, read_summary, summary_path
from squad_utils import NO_ANSWER, Example, read_examples

ROOT = Path(__file__).parents[3]
SQUAD = ROOT.parent / "shared/data/squad/squad_val_1k.jsonl"
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
    assert [list(row) for row in rows] == [list(COLUMNS)] * 2


def write(path: Path, objects: list[dict]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"is_correct": "perhaps"}, "'is_correct' is 'perhaps'; it must be true or false"),
        ({"answers": "Oslo"}, "'answers' is 'Oslo'; it must be a list of texts"),
        ({"answers": [1]}, "'answers' is [1]; it must be a list of texts"),
        ({"guess": None}, "'guess' is None; it must be text"),
        ({"guess": "\ud800"}, "'guess' is '\\ud800'; it must be text"),
        ({"f1": 1.5}, "'f1' is 1.5; it must be a number from 0 to 1"),
        ({"time": "1 s"}, "'time' is '1 s'; it must be a number from 0 to 1e+15"),
        ({"num_tokens": 40.5}, "'num_tokens' is 40.5; it must be a whole number from 0 to 1e+15"),
        (
            {"num_tokens": 10**400},
            f"'num_tokens' is 1{'0' * 39}; it must be a whole number from 0 to 1e+15",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_line(tmp_path, changed, complaint):
    row = result_row(0, BO, answer("x"))
    path = write(tmp_path / "results.jsonl", [row, row | changed])
    with pytest.raises(UserError) as caught:
        read_results(path)
    assert str(caught.value) == f"{path} line 2: {complaint}"


# Older layouts

WITH_CONTEXT = {  # as the original project's eval_mamba_with_context.py writes it
    "idx": 0,
    "context": BO.context,
    "question": BO.question,
    "answer": "a cat",
    "guess": "The Cat",
    "is_correct": False,
    "time": 0.5,
}
N_SHOT = {  # as its eval_n_shot_mamba.py does
    "idx": 0,
    "question": BO.question,
    "answer": NO_ANSWER,
    "guess": NO_ANSWER,
    "is_correct": True,
    "time": 0.5,
    "num_tokens": 90,
    "tokens_per_sec": 180.0,
}
NOT_MEASURED = {"confidence": None, "no_answer_probability": None, "num_new_tokens": None}


def test_rows_of_the_original_project_are_completed(tmp_path):
    path = write(tmp_path / "results.jsonl", [WITH_CONTEXT, N_SHOT])
    first, second = read_results(path)
    assert list(first) == list(second) == list(COLUMNS)
    made = {"answers": ["a cat"], "exact_match": 1.0, "f1": 1.0, "id": first["id"]}
    rest = {"num_tokens": None, "tokens_per_sec": None}
    assert first == WITH_CONTEXT | made | NOT_MEASURED | rest
    made = {"answers": [], "exact_match": 1.0, "f1": 1.0, "id": second["id"], "context": None}
    assert second == N_SHOT | made | NOT_MEASURED
    assert read_objects(path) == ({1: WITH_CONTEXT, 2: N_SHOT}, False)


def test_ids_are_those_of_the_data(tmp_path):
    data = [
        {"context": "Bo is a cat.", "prompt": "What is Bo?", "response": "a cat"},
        {"context": "Bo is a cat.", "prompt": "Who is Ann?", "response": "i don't know"},
    ]
    examples = read_examples(write(tmp_path / "data.jsonl", data))
    rows = [
        {"context": d["context"], "question": d["prompt"], "answer": d["response"], "guess": "x"}
        for d in data
    ]
    named_as_data = [d | {"guess": "x"} for d in data]
    for objects in (rows, named_as_data):
        found = read_results(write(tmp_path / "results.jsonl", objects))
        assert [(r["idx"], r["id"]) for r in found] == [(i, e.id) for i, e in enumerate(examples)]
        assert [r["answer"] for r in found] == [e.target for e in examples]
        assert [r["answers"] for r in found] == [list(e.answers) for e in examples]
        assert [r["question"] for r in found] == [e.question for e in examples]


def test_what_a_row_of_an_older_layout_has_is_kept_but_for_its_scores(tmp_path):
    row = result_row(7, BO, answer("small cat"))
    older = {name: value for name, value in row.items() if name not in ("f1", "tokens_per_sec")}
    older |= {"exact_match": "yes", "is_correct": "perhaps", "id": 12}
    [found] = read_results(write(tmp_path / "results.jsonl", [older]))
    assert found == row | {"id": "12", "tokens_per_sec": None}


@pytest.mark.parametrize("missing", ["question", "guess", "answer"])
@pytest.mark.parametrize("is_null", [False, True])
def test_another_layout_is_reported_with_its_columns(tmp_path, missing, is_null):
    row = {name: value for name, value in WITH_CONTEXT.items() if name != missing}
    bad = WITH_CONTEXT | {missing: None} if is_null else row
    path = write(tmp_path / "results.jsonl", [WITH_CONTEXT, bad])
    with pytest.raises(UserError) as caught:
        read_results(path)
    columns = ", ".join(row)
    needed = "question, guess, and answers or answer"
    assert str(caught.value) == (
        f"{path} line 2: another layout (columns: {columns}); needed: {needed}"
    )


def test_the_columns_of_another_layout_are_one_short_line(tmp_path):
    objects = [{f"column\n{i}": i for i in range(1000)}]
    with pytest.raises(UserError) as caught:
        read_results(write(tmp_path / "a.jsonl", objects))
    assert "column 0, column 1" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    with pytest.raises(UserError, match=r"another layout \(columns: none\)"):
        read_results(write(tmp_path / "a.jsonl", [{}]))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"guess": 7}, "'guess' is 7; it must be text"),
        ({"answer": ["a"]}, "'answer' is ['a']; it must be text"),
        ({"answers": {"text": ["a"]}}, "'answers' is {'text': ['a']}; it must be a list of texts"),
        ({"context": 1}, "'context' is 1; it must be text"),
        ({"idx": "0"}, "'idx' is '0'; it must be a whole number from 0 to 1e+15"),
        ({"time": "0.5 s"}, "'time' is '0.5 s'; it must be a number from 0 to 1e+15"),
        ({"confidence": 99}, "'confidence' is 99; it must be a number from 0 to 1"),
    ],
)
def test_a_value_of_an_older_layout_that_does_not_fit_is_named(tmp_path, changed, complaint):
    path = write(tmp_path / "results.jsonl", [WITH_CONTEXT | changed])
    with pytest.raises(UserError) as caught:
        read_results(path)
    assert str(caught.value) == f"{path} line 1: {complaint}"


def test_scores_of_an_older_layout_are_those_of_a_run(tmp_path):
    """On real questions, guessed rightly, wrongly, in part and not at all."""
    if not SQUAD.exists():
        pytest.skip(f"needs {SQUAD}")
    examples = read_examples(str(SQUAD))
    guesses = [
        (e.target, e.context.split(".")[0], f"the {e.target} of", NO_ANSWER, "")[idx % 5]
        for idx, e in enumerate(examples)
    ]
    rows = [
        result_row(i, e, answer(g)) for i, (e, g) in enumerate(zip(examples, guesses, strict=True))
    ]
    names = ("context", "question", "answer", "guess", "time")
    older = [{name: row[name] for name in names} for row in rows]
    found = read_results(write(tmp_path / "results.jsonl", older))
    unknown = dict.fromkeys(("num_tokens", "tokens_per_sec")) | NOT_MEASURED
    assert found == [row | unknown for row in rows]


# The summary

PART = "is incomplete: "


@pytest.mark.parametrize(
    ("num_rows", "summary", "is_torn", "expected"),
    [
        (12, {}, False, None),
        (12, {"articles": []}, False, None),
        (12, {"complete": True}, False, None),
        (12, {"complete": True, "num_questions": 12}, False, None),
        (12, {"complete": False, "num_questions": 100}, False, f"{PART}12 of 100 questions"),
        (12, {"complete": True, "num_questions": 100}, False, f"{PART}12 of 100 questions"),
        (30, {"num_questions": 20}, False, "has more rows, 30, than its run has questions, 20"),
        (1200, {"complete": None}, False, f"{PART}1,200 questions"),
        (
            12,
            {"complete": 0, "num_questions": 12},
            False,
            "has all of its run's 12 questions, but the run has not ended",
        ),
        (12, {}, True, f"{PART}12 questions; its last line is torn"),
        (
            12,
            {"complete": True, "num_questions": 12},
            True,
            f"{PART}12 of 12 questions; its last line is torn",
        ),
    ],
)
def test_incompleteness(num_rows, summary, is_torn, expected):
    assert incompleteness(num_rows, summary, is_torn) == expected


def test_whether_the_last_line_is_torn(tmp_path):
    path = Path(write(tmp_path / "results.jsonl", [WITH_CONTEXT] * 2))
    whole = path.read_bytes()
    for end, torn in (
        (len(whole), False),
        (-1, False),
        (-2, True),
        (whole.index(b"\n") + 1, False),
    ):
        path.write_bytes(whole[:end])
        assert read_objects(str(path))[1] is torn, end


def test_a_summary_without_what_is_out_of_shape(tmp_path, capsys):
    good = {"complete": True, "num_questions": 3, "made_by": []}
    bad = {"settings": [], "num_questions": "3", "made_by": {}, "articles": None}
    flags = {"num_questions": True, "first_negative": False}
    for summary, expected in ((good, good), (bad, {}), (flags, {})):
        summary_path(tmp_path / "a.jsonl").write_text(json.dumps(summary))
        assert read_summary(tmp_path / "a.jsonl", warns=True) == expected
        ignored = sorted(summary.keys() - expected.keys())
        said = capsys.readouterr().err
        assert all(name in said for name in ignored) and bool(said) == bool(ignored)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "\xff"])
def test_a_summary_that_cannot_be_read_is_empty(tmp_path, capsys, content):
    if content is not None:
        summary_path(tmp_path / "a.jsonl").write_text(content, "latin-1")
    assert read_summary(tmp_path / "a.jsonl", warns=True) == {}
    said = capsys.readouterr().err
    assert said.count("\n") == (content is not None)
    assert content is None or ("a.jsonl.summary.json" in said and "ignored" in said)


def test_articles_are_run_lengths():
    summary = {"articles": [["Oslo", 2], [None, 1], ["Rome", 1]]}
    rows = [{"idx": idx} for idx in range(6)]
    assert articles_by_idx(summary, rows) == {0: "Oslo", 1: "Oslo", 3: "Rome"}
    assert articles_by_idx(summary | {"num_questions": 4}, rows[3:]) == {3: "Rome"}
    assert articles_by_idx({}, rows) == {}


@pytest.mark.parametrize(
    "articles", [[["a", 3]], [["a", -1], ["b", 3]], [["a", 10**12]], [["a", True]], [["a"]], [3]]
)
def test_articles_that_cannot_be_are_none(articles):
    summary = {"articles": articles, "num_questions": 2}
    assert articles_by_idx(summary, [{"idx": 0}, {"idx": 1}]) == {}


def test_a_huge_article_takes_no_memory():
    assert articles_by_idx({"articles": [["a", 10**12]]}, [{"idx": 7}]) == {7: "a"}


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = Path(write(tmp_path / "results.jsonl", [WITH_CONTEXT] * 2))
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n  \n"))
    objects, is_torn = read_objects(str(path))
    assert list(objects) == [2, 4] and not is_torn
    assert len(read_results(str(path))) == 2
    path.write_bytes(path.read_bytes() + b'{"guess": "x"}\n')
    with pytest.raises(UserError, match=r"results\.jsonl line 6: another layout"):
        read_results(str(path))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", ": the file is empty; give JSONL"),
        (b"\n \n", ": the file is empty; give JSONL"),
        ('{"guess": "x"}\n'.encode("utf-16"), ": is UTF-16 text; convert the file to UTF-8"),
        ('{"guess": "x"}'.encode("utf-16"), ": is UTF-16 text; convert the file to UTF-8"),
        (b"\n{", " line 2: not a JSON object"),
    ],
)
def test_files_without_rows(tmp_path, data, complaint):
    path = tmp_path / "results.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_objects(str(path))
    assert str(caught.value).startswith(f"{path}{complaint}")


# Columns are defined once


def test_the_documentation_lists_the_columns_as_they_are_defined():
    page = (ROOT / "results/README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", page, flags=re.MULTILINE)
    kinds = {int: "integer", str: "text", list: "list of texts", bool: "boolean", float: "number"}
    assert table == [
        (name, kinds[column.kind] + (" or null" if column.is_nullable else ""), column.meaning)
        for name, column in COLUMNS.items()
    ]


def test_a_new_column_is_defined_in_one_place(monkeypatch):
    """Reading, checks and SQL follow the dataclass."""

    @dataclass
    class Wider(ResultRow):
        perplexity: Annotated[float | None, About("of the guess", 100)]

    columns = columns_of(Wider)
    assert list(columns) == [*COLUMNS, "perplexity"]
    assert columns["perplexity"] == (float, "of the guess", 100, True)
    for module in (rows, reading):
        monkeypatch.setattr(module, "COLUMNS", columns)
    example = Example("1", "c", "q", ("a",))
    row = result_row(0, example, Answer("a", 0.5, 0.5, 1.0, 3, 1)) | {"perplexity": 7.5}
    assert results_rows({1: row}, "r.jsonl") == [row]
    with pytest.raises(UserError, match="'perplexity' is 101; it must be a number from 0 to 1e"):
        results_rows({1: row | {"perplexity": 101}}, "r.jsonl")
