"""compare_results.py: paired differences, and what may not be compared."""

from common.script import run_script

import json
import re
import sys
from math import comb
from pathlib import Path

import pytest

import compare_results
from context_qa.results import comparison
from context_qa.results.rows import Answer, result_row
from squad_utils import NO_ANSWER, Example


def rows(guesses: list[str], start: int = 0, are_negatives: bool = False) -> list[dict]:
    """Every third question is unanswerable, the others' answer is x."""
    found = []
    for idx, guess in enumerate(guesses, start=start):
        answers = () if are_negatives or idx % 3 == 2 else ("x",)
        mark = "#random" if are_negatives else ""
        example = Example(f"q{idx}{mark}", f"Context {idx // 4}.", f"Who is {idx}?", answers)
        found.append(result_row(idx, example, Answer(guess, 0.5, 0.25, 0.5, 10, 1)))
    return found


def write(path: Path, rows: list[dict], articles: list | None = None, **summary) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary |= {} if articles is None else {"articles": articles}
    if summary:
        path.with_name(f"{path.name}.summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["compare_results.py", *map(str, arguments)])
        run_script(compare_results.main, compare_results.parse_args)
        return capsys.readouterr().out

    return run


@pytest.fixture
def fail(run, capsys):
    def fail(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == "" and err.count("\n") == 1
        return err

    return fail


def compared(run, a: Path, b: Path) -> dict:
    return json.loads(run(a, b, "--format", "json"))


A = ["x", "x", NO_ANSWER, "y", "x", "z", "x", "y", NO_ANSWER]  # right but for 3, 5, 7
B = ["x", "y", NO_ANSWER, "x", "x", NO_ANSWER, "x", "x y", "x"]  # right but for 1, 7, 8


def test_scores_and_their_differences(run, tmp_path):
    found = compared(run, write(tmp_path / "a", rows(A)), write(tmp_path / "b", rows(B)))
    assert (found["num_questions"], found["num_left_out"]) == (9, 0)
    entry = found["differences"]["exact_match"]
    assert (entry["a"], entry["b"], entry["difference"]) == pytest.approx((200 / 3, 200 / 3, 0))
    assert entry["interval"][0] < 0 < entry["interval"][1]
    f1 = found["differences"]["f1"]
    assert f1["difference"] == pytest.approx(100 * (2 / 3) / 9)
    answered = found["differences"]["has_answer_exact_match"]
    assert (answered["a"], answered["b"]) == pytest.approx((400 / 6, 400 / 6))
    assert "negatives_exact_match" not in found["differences"]


def test_flips_and_their_test(run, tmp_path):
    found = compared(run, write(tmp_path / "a", rows(A)), write(tmp_path / "b", rows(B)))
    assert [row["idx"] for row in found["only_a_right"]] == [1, 8]
    assert [row["idx"] for row in found["only_b_right"]] == [3, 5]
    first = found["only_b_right"][0]
    assert (first["guess_a"], first["guess_b"], first["answer"]) == ("y", "x", "x")
    assert found["mcnemar_p"] == 1.0


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (1, 9), (10, 2), (6, 6)])
def test_mcnemars_test_is_the_exact_binomial(only_a, only_b):
    """Twice the smaller tail of fair coins, at most 1."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
    assert comparison.mcnemar_p_value(only_a, only_b) == pytest.approx(min(2 * tail, 1.0))


def test_the_same_file_differs_in_nothing(run, tmp_path):
    path = write(tmp_path / "a", rows(A))
    found = compared(run, path, path)
    assert all(entry["difference"] == 0 for entry in found["differences"].values())
    assert found["only_a_right"] == found["only_b_right"] == [] and found["mcnemar_p"] == 1.0


def test_a_paired_interval_is_narrower_than_two_of_their_own(run, tmp_path):
    """Both runs fail on the same questions: what they share is no difference."""
    common = ["x" if i % 2 else "y" for i in range(300)]
    better = common[:-30] + ["x"] * 30
    a, b = write(tmp_path / "a", rows(common)), write(tmp_path / "b", rows(better))
    low, high = compared(run, a, b)["differences"]["has_answer_exact_match"]["interval"]
    assert 0 < low < high < 10


def test_intervals_are_over_articles_where_a_summary_has_them(run, tmp_path):
    a, b = rows(["x"] * 300), rows(["x"] * 270 + ["y"] * 30)
    articles = [[str(i), 30] for i in range(10)]
    widths = []
    for runs in (None, articles):
        paths = write(tmp_path / "a", a, runs), write(tmp_path / "b", b)
        low, high = compared(run, *paths)["differences"]["exact_match"]["interval"]
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_one_article_has_no_intervals_and_no_text_speaks_of_one(run, tmp_path):
    a = write(tmp_path / "a", rows(A), [["Norway", 9]])
    out = run(a, write(tmp_path / "b", rows(B)))
    assert "no 95 % intervals: 1 article cannot be resampled\n" in out
    assert out.count("95 % interval") == 1 and not re.search(" $", out, re.MULTILINE)
    out = run(write(tmp_path / "a", rows(A), [["Norway", 3], ["Italy", 6]]), tmp_path / "b")
    assert (
        "B - A   95 % interval\n" in out and "\n95 % intervals: bootstrap over 2 articles\n" in out
    )


def test_negatives_are_compared_apart_and_those_in_one_file_only_are_skipped(run, tmp_path):
    negatives_a = rows([NO_ANSWER] * 3, start=9, are_negatives=True)
    negatives_b = rows(["x", NO_ANSWER], start=9, are_negatives=True)
    a = write(tmp_path / "a", rows(A) + negatives_a, first_negative=9)
    b = write(tmp_path / "b", rows(B) + negatives_b)
    found = compared(run, a, b)
    assert (found["num_questions"], found["num_left_out"]) == (11, 1)
    entry = found["differences"]["negatives_exact_match"]
    assert (entry["a"], entry["b"]) == (100.0, 50.0)
    assert "1 in one file only are skipped" in run(a, b)
    # What the test and the flipped questions are about is "all", as in the table.
    assert found["mcnemar_p"] == 1.0 and len(found["only_b_right"]) == 2
    assert [row["idx"] for row in found["only_a_right"]] == [1, 8]


def test_rows_are_paired_in_whatever_order(run, tmp_path):
    a, b = write(tmp_path / "a", rows(A)), write(tmp_path / "b", rows(B)[::-1])
    straight = compared(run, a, write(tmp_path / "c", rows(B)))
    assert compared(run, a, b)["differences"] == straight["differences"]


@pytest.mark.parametrize("name", ["id", "context", "question", "answers"])
def test_files_of_different_data_are_refused(fail, tmp_path, name):
    changed = rows(B)
    changed[4][name] = ["z"] if name == "answers" else "other"
    a, b = write(tmp_path / "a", rows(A)), write(tmp_path / "b", changed)
    assert f"results of different data; at idx 4 there is another {name}\n" in fail(a, b)


def test_files_without_a_common_question_are_refused(fail, tmp_path):
    a, b = write(tmp_path / "a", rows(A)), write(tmp_path / "b", rows(A, start=9))
    assert "no question is in both" in fail(a, b)
    assert "missing: cannot be read" in fail(a, tmp_path / "missing")
    twice = write(tmp_path / "twice", rows(A) + rows(A[:1]))
    assert "twice: an idx occurs twice" in fail(a, twice)


@pytest.mark.parametrize("rest", [["context"], [], ["context", "num_tokens"]])
def test_an_older_layout_is_compared_with_this_one(run, tmp_path, rest):
    """The ids that this one has need not be those of the data that the other was made of."""
    b = rows(B)
    names = ("idx", "question", "answer", "guess", *rest)
    older = [{name: row[name] for name in names} for row in b]
    new = compared(run, write(tmp_path / "a", rows(A)), write(tmp_path / "b", b))
    found = compared(run, write(tmp_path / "a", rows(A)), write(tmp_path / "b", older))
    for name in ("num_questions", "num_left_out", "differences", "mcnemar_p"):
        assert found[name] == new[name]
    for name in ("only_a_right", "only_b_right"):
        assert [row | {"id": ""} for row in found[name]] == [row | {"id": ""} for row in new[name]]
    found = compared(run, tmp_path / "b", tmp_path / "b")
    assert found["num_questions"] == 9 and found["mcnemar_p"] == 1.0


@pytest.mark.parametrize("name", ["context", "question", "answer"])
def test_an_older_layout_of_different_data_is_refused(fail, tmp_path, name):
    older = [{n: row[n] for n in ("context", "question", "answer", "guess")} for row in rows(B)]
    older[4][name] = "other"
    a, b = write(tmp_path / "a", rows(A)), write(tmp_path / "b", older)
    different = "answers" if name == "answer" else name
    assert f"results of different data; at idx 4 there is another {different}\n" in fail(a, b)


def test_another_layout_is_named(fail, tmp_path):
    a, b = write(tmp_path / "a", rows(A)), write(tmp_path / "b", [{"prompt": "x", "score": 1}])
    complaint = fail(a, b)
    assert complaint.startswith(f"error: {b} line 1: another layout (columns: prompt, score); need")


def test_incomplete_files_are_called_so(monkeypatch, capsys, tmp_path):
    a, b = write(tmp_path / "a", rows(A)), write(tmp_path / "b", rows(B[:4]))
    for path in (a, b):
        summary = {"complete": path == a, "num_questions": 9}
        path.with_name(f"{path.name}.summary.json").write_text(json.dumps(summary))
    monkeypatch.setattr(sys, "argv", ["compare_results.py", str(a), str(b)])
    compare_results.main(compare_results.parse_args())
    assert capsys.readouterr().err == f"warning: {b} is incomplete: 4 of 9 questions\n"


def test_the_table_fits_in_eighty_columns(run, tmp_path):
    out = run(write(tmp_path / "a", rows(A * 9)), write(tmp_path / "b", rows(B * 9)))
    assert "all: exact match" in out and "McNemar's exact test: p = 1\n" in out
    assert "Only A is right, the first 10 of 18:" in out
    lines = out.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    assert out.count("\n  ") == 40  # two lines each
