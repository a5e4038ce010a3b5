"""No script prints control characters of foreign text on a terminal; JSON output is valid JSON."""

from common.script import run_script

import csv
import io
import json
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compare_results
import query_results
import report_results
from common.json_text import json_line, plain_json
from context_qa.console.terminal import Screen
from context_qa.results.rows import Answer, result_row
from context_qa.results.score_table import print_summary
from context_qa.results.summary import summary_path
from squad_utils import Example

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b[2J\x9b31m\r\b\x07\x7f\u202eevil\u2066\u2028\x1b]0;title\x07\nerror: all lost\tx"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def is_harmless(text: str) -> bool:
    return "evil" in text and not CONTROLS.search(text) and "\nerror: all lost" not in text


def write(path: Path, guess: str) -> Path:
    rows = []
    for idx in range(3):
        texts = (f"{idx}{name} {HOSTILE}" for name in ("id", "context", "question", "answer"))
        identifier, context, question, answer = texts
        example = Example(identifier, context, question, (answer,))
        guessed = answer if guess == "right" or idx == 1 else f"{guess} {HOSTILE}"
        rows.append(result_row(idx, example, Answer(guessed, 0.5, 0.25, 0.5, 10, 1)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {
        "arguments": {"model": HOSTILE, "data": HOSTILE},
        "settings": {HOSTILE: HOSTILE},
        "warnings": [HOSTILE],
        "articles": [[HOSTILE, 3]],
        "num_questions": 4,
        "complete": False,
    }
    summary_path(path).write_text(json.dumps(about))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script on these arguments; return what it prints."""

    def run(script, *arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            run_script(script.main, script.parse_args)
        except SystemExit as ended:
            assert ended.code == 2
        return capsys.readouterr()

    return run


@pytest.fixture
def hostile(tmp_path) -> list[Path]:
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    return [write(folder / "a.jsonl", "right"), write(folder / "b.jsonl", "wrong")]


def strict(text: str) -> object:
    def refuse_constant(word: str):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse_constant)


def test_compared_results(run, hostile):
    out, err = run(compare_results, *hostile)
    assert is_harmless(out) and is_harmless(err)
    assert "Only A is right" in out and out.count("\n      answer ") == 2
    out, _ = run(compare_results, *hostile, "--format", "json")
    assert is_harmless(out) and out.count("\n") == 1
    assert strict(out)["only_a_right"][0]["question"] == f"0question {HOSTILE}"


def test_refused_results(run, hostile):
    rows = hostile[1].read_text().replace("0question", "another")
    hostile[1].write_text(rows)
    out, err = run(compare_results, *hostile)
    assert out == "" and is_harmless(err) and "another question" in err


def test_queried_results(run, hostile):
    sql = f'SELECT question, guess, answers, 1 AS "x{HOSTILE}" FROM df'
    out, err = run(query_results, hostile[0], sql)
    assert is_harmless(out.replace("\n", " ")) and is_harmless(err)
    out, _ = run(query_results, hostile[0], sql, "--format", "json")
    assert is_harmless(out) and out.count("\n") == 3
    assert strict(out.split("\n")[0])[f"x{HOSTILE}"] == 1
    _, err = run(query_results, hostile[0], f"SELECT '{HOSTILE}' FROM nothing")
    assert "\n" in err and not CONTROLS.search(err)


def test_csv_is_exact_except_on_a_terminal(run, hostile):
    out, _ = run(query_results, hostile[0], "SELECT question FROM df", "--format", "csv")
    assert list(csv.reader(io.StringIO(out, newline="")))[1] == [f"0question {HOSTILE}"]
    printed = at_terminal(
        "query_results.py", hostile[0], "SELECT question FROM df", "--format", "csv"
    )
    assert is_harmless(printed) and printed.count("evil") == 3


def at_terminal(*command: object) -> str:
    """The output of a script whose standard output is a terminal."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, *map(str, command)]
    subprocess.run(arguments, cwd=ROOT, stdout=theirs, stderr=subprocess.DEVNULL, check=True)
    with open(ours, "rb") as terminal:
        return terminal.read1(1 << 16).decode().replace("\r\n", "\n")


def test_reported_results(run, hostile):
    out, _ = run(report_results, hostile[0])
    assert is_harmless(out)


def test_warnings_of_a_summary(capsys):
    about = {"scores": {}, "intervals": {}, "intervals_over": "1 article"}
    print_summary(about | {"warnings": [HOSTILE, 5]})
    out = capsys.readouterr().out
    assert is_harmless(out) and "no 95 % intervals: 1 article cannot be resampled\n" in out


def test_evaluated_questions_and_a_resumed_run(tmp_path):
    data = tmp_path / f"data{HOSTILE.replace('/', '')}.jsonl"
    row = {"context": f"Bo. {HOSTILE}", "question": HOSTILE, "answers": ["..."], "id": HOSTILE}
    data.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    output = tmp_path / f"out{HOSTILE.replace('/', '')}.jsonl"
    command = [sys.executable, "eval_mamba_with_context.py", "sliding-window", data, output]
    for extra in ([], ["--max_new_tokens", "3"]):
        done = subprocess.run([*map(str, command), *extra], cwd=ROOT, capture_output=True, env={})
        out, err = done.stdout.decode(), re.sub(r"\r? *\d+%[^\r\n]*", "", done.stderr.decode())
        assert done.returncode == (2 if extra else 0), err
        assert is_harmless(err) and (extra or is_harmless(out))


def test_a_console(tmp_path):
    model = shutil.copytree(ROOT / "models/demo", tmp_path / "model")
    (model / "NOTE.txt").write_text(HOSTILE)
    context = tmp_path / "context.txt"
    context.write_text(f"Bo is a cat. {HOSTILE}", newline="")
    command = [
        *(sys.executable, "prompt_mamba_with_context.py", str(model), "--explain"),
        *("--context_file", str(context), "--question", f"Who is Bo? {HOSTILE}"),
    ]
    environment = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0
    assert not CONTROLS.search(out + err) and "evil" in out and "evil" in err
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, env=environment)
    assert is_harmless(done.stdout.decode())
    assert strict(done.stdout.decode())["question"] == f"Who is Bo? {HOSTILE}"


def test_a_screen(capsys):
    screen = Screen()
    for piece in HOSTILE:  # as the tokens of an answer come
        screen.print_answer(piece, "dim")
    screen.print_status(HOSTILE)
    out, err = capsys.readouterr()
    assert not CONTROLS.search(out + err) and "evil" in out and "evil" in err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([float("nan"), float("inf"), -float("inf"), 1.5], "[null, null, null, 1.5]"),
        ({"NaN": "Infinity\\", "x": '-Infinity" NaN'}, None),
        ("\x9b\u2028\ud800\x7f", r'"\u009b\u2028\ud800\u007f"'),
        ("“日本”", '"“日本”"'),
    ],
)
def test_json_line(value, text):
    line = json_line(value)
    assert line == text or (text is None and strict(line) == value)
    assert not CONTROLS.search(line) and "\n" not in line
    strict(line)


def test_json_with_whitespace_between_tokens():
    assert plain_json('{"a":\n\t[NaN,\r"\\n"]}') == '{"a":  [null, "\\n"]}'


def test_numbers_that_are_not_finite_in_a_query(run, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1.5, "s": "NaN, \\"Infinity\\""}\n')
    sql = "SELECT *, 'nan'::FLOAT AS n, [1.0, '-inf'::FLOAT] AS l, {'k': 'inf'::FLOAT} AS d FROM df"
    out, _ = run(query_results, path, sql, "--format", "json")
    wanted = {"a": 1.5, "s": 'NaN, "Infinity"', "n": None, "l": [1.0, None], "d": {"k": None}}
    assert strict(out) == wanted
