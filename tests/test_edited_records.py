"""Results and summaries that a hand has edited: an answer or one line, and JSON that is JSON."""

import json
import sys
from pathlib import Path

import pytest

import compare_results
import query_results
import report_results
from common.errors import UserError
from context_qa.results.results_file import ResultsFile
from context_qa.results.rows import Answer, result_row
from context_qa.results.summary import read_summary
from squad_utils import Example

EXAMPLES = [
    Example(f"q{idx}", "Bo is a cat.", f"Who is {idx}?", ("a cat",) if idx % 2 else (), article)
    for idx, article in enumerate(["cats", "cats", "dogs", "dogs"])
]
ROWS = [
    result_row(idx, example, Answer("a cat", 0.5, 0.25, 0.5, 140, 3))
    for idx, example in enumerate(EXAMPLES)
]
SETTINGS = {"model": "abc", "negatives": None}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = {
    "null": None,
    "true": True,
    "minus one": -1,
    "large": 10**18,
    "huge": 10**4000,
    "float": 1.5,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "1e308": 1.7976931348623157e308,
    "text": "x",
    "half a letter": "\ud800",
    "escape": "\x1b[2J\u2028\n",
    "list": [1],
    "pairs that are none": [[1], [], ["a", "b", "c"], 3],
    "runs": [["cats", 10**18], ["dogs", -(10**18)]],
    "runs that are too long": [["cats", 10**18]],
    "lists": [["x"]],
    "nested": nested(60),
    "nested too deep": nested(70),
    "object": {"x": 1},
    "junk": {"rows": -1, "packages": [1], "": {"x": nested(30)}, "exact_match": [None]},
    "junk in a list": [{"rows": 1, "packages": [1], "git_commit": {"x": []}}, {"rows": 10**18}],
}
EDITS = [  # every other one is for `make test-slow`
    pytest.param(value, id=name, marks=[pytest.mark.slow] * (place % 2))
    for place, (name, value) in enumerate(VALUES.items())
]
KEYS = ["settings", "arguments", "articles", "num_questions", "first_negative", "made_by"]
KEYS += ["warnings", "scores", "intervals", "complete", "packages", "wall_seconds", "more"]
SETTING = ["model", "negatives", "no_answer_threshold", "more"]
CONTENTS = {
    "brackets": "[" * 100_000,
    "braces": '{"a":' * 100_000,
    "digits": "1" * 5000,
    "no JSON": "{",
    "latin-1": b'{"settings": "\xe9"}',
    "not an object": "[1]",
    "empty": "",
    "keys twice": '{"settings": {}, "settings": {"model": "abc"}, "articles": 1, "articles": []}',
}


@pytest.fixture
def path(tmp_path) -> Path:
    """A finished run."""
    path = tmp_path / "r.jsonl"
    with ResultsFile(str(path), EXAMPLES, record()) as results:
        results.write(ROWS)
        results.finish()
    return path


def record() -> dict:
    return {"settings": SETTINGS, "arguments": {"model": "m", "data": "d"}, "first_negative": None}


@pytest.fixture
def ask(monkeypatch, capsys):
    """Every reader of results on a file: each works, or says in a UserError why not."""
    monkeypatch.setattr("context_qa.results.report.charts", lambda *rows: "")  # which take long
    monkeypatch.setattr("context_qa.results.metrics.RESAMPLES", 9)

    def run(script, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        try:
            script.main(script.parse_args())
        except UserError:
            return ""
        finally:
            out = capsys.readouterr().out
        return out

    def ask(path: Path) -> None:
        run(compare_results, path, path)
        out = run(compare_results, path, path, "--format", "json")
        json.loads(out or "{}", parse_constant=pytest.fail)
        run(report_results, path, "--overwrite")
        for line in run(query_results, path, "FROM df", "--format", "json").split("\n")[:-1]:
            json.loads(line, parse_constant=pytest.fail)

    return ask


def resume(path: Path) -> None:
    """The evaluation again, with the rows that are there."""
    try:
        with ResultsFile(str(path), EXAMPLES, record()) as results:
            results.write(row for row in ROWS if row["idx"] not in results.done)
            results.finish()
    except UserError:
        return
    text = path.with_name("r.jsonl.summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["scores"]["num_questions"] == 4


@pytest.mark.parametrize("value", EDITS)
def test_edited_summaries(path, ask, value):
    summary = path.with_name("r.jsonl.summary.json")
    whole = read_summary(path)
    edits = [{key: value} for key in KEYS]
    edits += [{"settings": SETTINGS | {key: value}} for key in SETTING]
    edits += [{"articles": [["cats", value], [value, 2]]}, {"made_by": [{"rows": value}]}]
    edits += [{"made_by": [{"rows": 2, "packages": value, "git_commit": value}] * 2}]
    for edit in edits:
        summary.write_text(json.dumps(whole | edit))
        ask(path)
        resume(path)
        summary.write_text(json.dumps(whole | {"complete": False} | edit))
        resume(path)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_summaries_that_are_none(path, ask, content):
    summary = path.with_name("r.jsonl.summary.json")
    summary.write_bytes(content if isinstance(content, bytes) else content.encode())
    ask(path)
    resume(path)


@pytest.mark.parametrize("value", EDITS)
def test_edited_rows(path, ask, value):
    for key in (*ROWS[0], "more"):
        rows = [row | {key: value} for row in ROWS]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ask(path)
        path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:3], rows[3]]))
        resume(path)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_lines_that_are_no_rows(path, ask, content):
    content = content if isinstance(content, bytes) else content.encode()
    whole = path.read_bytes()
    for data in (content, content + b"\n" + whole, whole + content, whole + content + b"\n"):
        path.write_bytes(data)
        ask(path)
        resume(path)
