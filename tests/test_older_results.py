"""Results that an older version wrote resume, are recognized as complete, and are read by SQL, by
comparisons and by the report.

tests/older/README.md has the commands that wrote them.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import compare_results
import eval_mamba_with_context
import query_results
import report_results
from context_qa.results.reading import read_results
from context_qa.results.summary import read_summary, summary_path

OLDER = Path(__file__).parent / "older"
COMMANDS = {
    "fx/results.jsonl": ("--negatives", "random"),
    "fx/spans.jsonl": (
        *("--constrain_to_context", "--no_answer_threshold", "0.3"),
        *("--limit", "10"),
    ),
}
MEASURED = ("time", "tokens_per_sec")
PROBABILITIES = ("confidence", "no_answer_probability")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fx(tmp_path, monkeypatch) -> Path:
    """A copy of the older files, where their commands name them."""
    shutil.copytree(OLDER, tmp_path / "fx")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "fx"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script with these arguments; what it prints."""

    def run(script, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main(script.parse_args())
        return capsys.readouterr().out

    return run


def evaluate(run, results: str) -> str:
    """The command that wrote the results."""
    flags = ("--max_new_tokens", "8", *COMMANDS[results])
    return run(eval_mamba_with_context, "fx/finished", "fx/eval.jsonl", results, *flags)


def cut(results: str, num_rows: int) -> None:
    """Leave what a killed run leaves: some rows, the beginning of another, the first summary."""
    lines = Path(results).read_bytes().splitlines(keepends=True)
    Path(results).write_bytes(b"".join(lines[:num_rows]) + lines[num_rows][:50])
    ended = ("complete", "scores", "intervals", "intervals_over", "abstention", "wall_seconds")
    summary = read_summary(results)
    kept = {name: value for name, value in summary.items() if name not in ended}
    summary_path(results).write_text(json.dumps({"complete": False} | kept))


@pytest.mark.parametrize(("results", "num_rows"), [("fx/results.jsonl", 10), ("fx/spans.jsonl", 4)])
def test_an_interrupted_run_resumes(run, results, num_rows):
    wanted, older = read_results(results), read_summary(results)
    cut(results, num_rows)
    kept = Path(results).read_bytes().splitlines()[:num_rows]
    assert "exact match" in evaluate(run, results)
    assert Path(results).read_bytes().splitlines()[:num_rows] == kept
    found, summary = read_results(results), read_summary(results)
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        assert [row[name] for name in PROBABILITIES] == pytest.approx(
            [other[name] for name in PROBABILITIES], rel=1e-4, abs=0
        )
        different = {name for name in row if row[name] != other[name]}
        assert different <= {*MEASURED, *PROBABILITIES}
    assert summary["complete"] is True and summary["rows_of_earlier_runs"] == num_rows
    for name in ("settings", "arguments", "scores", "first_negative", "num_questions", "articles"):
        assert summary[name] == older[name], name
    assert sum(entry["rows"] for entry in summary["made_by"]) == len(wanted)


@pytest.mark.parametrize("results", COMMANDS)
def test_a_complete_run_is_reported_and_not_written_again(run, results, monkeypatch):
    files = [Path(results), summary_path(results)]
    before = [path.read_bytes() for path in files]
    written_at = files[0].stat().st_mtime_ns
    monkeypatch.setattr("context_qa.evaluation.load_model_and_tokenizer", None)  # not needed
    assert "exact match" in evaluate(run, results)
    assert [path.read_bytes() for path in files] == before
    assert files[0].stat().st_mtime_ns == written_at


def test_a_query_gives_its_numbers(run):
    sql = "SELECT COUNT(*), SUM(exact_match), SUM(num_new_tokens) FROM df WHERE idx < 24"
    [line] = run(query_results, "fx/results.jsonl", sql, "--format", "json").splitlines()
    assert list(json.loads(line).values()) == [24, 1.0, 192]


def test_a_comparison_with_a_new_run_gives_its_numbers(run):
    new = ("sliding-window", "fx/eval.jsonl", "fx/new.jsonl", "--negatives", "random")
    run(eval_mamba_with_context, *new)
    files = ("fx/results.jsonl", "fx/new.jsonl")
    found = json.loads(run(compare_results, *files, "--format", "json"))
    assert (found["num_questions"], found["num_left_out"]) == (40, 0)
    names = ("exact_match", "has_answer_exact_match", "no_answer_f1", "negatives_f1")
    differences = [found["differences"][name]["difference"] for name in names]
    assert differences == pytest.approx([37.5, 62.5, -12.5, 0])
    assert found["mcnemar_p"] == pytest.approx(0.01171875)


def test_a_comparison_of_the_questions_in_both(run):
    files = ("fx/results.jsonl", "fx/spans.jsonl")
    found = json.loads(run(compare_results, *files, "--format", "json"))
    assert (found["num_questions"], found["num_left_out"]) == (10, 30)
    assert found["differences"]["exact_match"]["difference"] == 0


def test_a_report_shows_the_older_scores(run):
    assert run(report_results, "fx/results.jsonl") == "fx/results.html\n"
    page = Path("fx/results.html").read_text("utf-8")
    assert '<h1 dir="auto">fx/finished on fx/eval.jsonl</h1>' in page
    assert "16 with an answer, 8 without an answer, 16 on another context" in page
    for title, score in (("all", "4.2"), ("without answer", "12.5"), ("negatives", "0.0")):
        assert re.search(f'"row">{title}</th><td>[0-9]+</td><td><b>{score}</b>', page), title
    assert 'class="notice" role="note">Warning: ' in page
