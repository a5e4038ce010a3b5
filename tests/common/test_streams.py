"""Unusual standard streams, file names and limits: one line, no traceback."""

from common.script import run_script

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import query_results
from context_qa.results.rows import Answer, result_row
from squad_utils import Example

ROOT = Path(__file__).parents[2]
PYTHON = f"'{sys.executable}'"
LATIN = {"PYTHONIOENCODING": "latin-1"}
QUESTION = "Wie heißt die Δ-Funktion? 🐍"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@pytest.fixture
def results(tmp_path) -> str:
    """A results file whose name is not valid UTF-8, as on a command line."""
    path = os.fsencode(tmp_path) + b"/r\xff.jsonl"
    example = Example("q", "c", QUESTION, ("a",))
    rows = [result_row(idx, example, Answer("x", 0.5, 0.5, 1.0, 9, 9)) for idx in range(100)]
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return os.fsdecode(path)


def shell(command: str, *arguments: str, **environment: str) -> tuple[int, bytes, str]:
    """Run a shell command, in which $1 is the first argument."""
    process = subprocess.run(
        ["/bin/sh", "-c", command, "sh", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
    )
    err = process.stderr.decode()
    assert "Traceback" not in err and "Exception ignored" not in err
    return process.returncode, process.stdout, err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding, results):
    wanted = {"PYTHONIOENCODING": encoding}
    sql = "SELECT idx, question FROM df LIMIT 1"
    code, out, _ = shell(f'{PYTHON} query_results.py "$1" "{sql}"', results, **wanted)
    assert code == 0 and rb"\u0394" in out
    code, out, _ = shell(f"{PYTHON} prompt_mamba_with_context.py --help", **wanted)
    assert code == 0 and rb"\u0394" in out


def test_a_question_in_utf_8_is_read_in_any_locale():
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = (
        "import sys; from context_qa.arguments import add_console_flags;"
        "from common.command_line import Parser;"
        "parser = Parser(''); add_console_flags(parser);"
        "print(ascii(parser.parse_args().question[0]))"
    )
    run = f'{PYTHON} -c "{script}" --question "$1"'
    assert shell(run, QUESTION, **ascii_locale)[1].decode() == f"{QUESTION!a}\n"


def test_json_and_csv_are_utf_8_in_any_locale(results):
    sql = "SELECT idx, question FROM df LIMIT 1"
    command = f'{PYTHON} query_results.py "$1" "{sql}" --format'
    assert json.loads(shell(f"{command} json", results, **LATIN)[1])["question"] == QUESTION
    assert shell(f"{command} csv", results, **LATIN)[1].decode() == f"idx,question\n0,{QUESTION}\n"
    other = Path(results).with_name("other.jsonl")
    lines = Path(results).read_text("utf-8").replace('"exact_match": 0.0', '"exact_match": 1.0')
    other.write_text(lines, "utf-8")
    code, out, _ = shell(
        f'{PYTHON} compare_results.py "$1" "$2" --format json', results, str(other), **LATIN
    )
    assert code == 0 and json.loads(out)["only_b_right"][0]["question"] == QUESTION


def test_a_name_that_is_not_utf_8_is_printed(results):
    code, out, _ = shell(f'{PYTHON} report_results.py "$1"', results)
    assert code == 0 and rb"r\udcff.html" in out and Path(results).with_suffix(".html").exists()
    code, out, _ = shell(f'{PYTHON} compare_results.py "$1" "$1"', results)
    assert code == 0 and rb"r\udcff.jsonl" in out
    code, _, err = shell(f'{PYTHON} query_results.py "$1x" "SELECT 1"', results)
    assert code == 2 and r"r\udcff.jsonlx: cannot be read" in err


@pytest.mark.parametrize("where", [pytest.param("2>/dev/full", marks=needs_full), "2>&-"])
def test_standard_error_that_cannot_be_written_does_not_stop_a_script(where, results):
    assert shell(f'{PYTHON} query_results.py nope "SELECT 1" {where}')[0] == 2
    summary = Path(f"{results}.summary.json")
    summary.write_text("{}")  # of an interrupted run, which gives a warning
    code, out, _ = shell(f'{PYTHON} compare_results.py "$1" "$1" {where}', results)
    assert code == 0 and b"100 questions" in out
    assert shell(f"{PYTHON} -m data.prepare_squad nope out {where}")[0] == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(closed, tmp_path):
    script = tmp_path / "script_of_test.py"
    script.write_text(
        "from common.script import run_script\n"
        "import os, sys\n"
        "def main(args):\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        print('said', file=sys.stderr, flush=True)\n"
        "        print(sorted(os.listdir('/dev/fd'))[:3], file.fileno() > 2, file=file)\n"
        "run_script(main, lambda: None)\n"
    )
    written = tmp_path / "written"
    code, _, _ = shell(f'{PYTHON} "$1" "$2" {closed}', str(script), str(written), PYTHONPATH=ROOT)
    assert code == 0 and written.read_text() == "['0', '1', '2'] True\n"


def test_a_limit_on_the_size_of_files_is_reported(results, tmp_path):
    limited = f'ulimit -f 1; {PYTHON} query_results.py "$1" "FROM df" --format json'
    code, _, err = shell(f"({limited}) > '{tmp_path}/out'", results)
    assert (code, err) == (2, "error: standard output or input: File too large\n")
    code, _, err = shell(f'ulimit -f 1; {PYTHON} report_results.py "$1"', results)
    assert code == 2 and err.startswith("error: ") and "File too large" in err


def test_a_query_writes_no_file_and_has_a_memory_limit(results):
    sql = "SELECT current_setting('temp_directory') AS t, current_setting('memory_limit') AS m"
    out = json.loads(shell(f'{PYTHON} query_results.py "$1" "{sql}" --format json', results)[1])
    assert out["t"] == "" and out["m"].endswith("iB")


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_a_query_beyond_its_memory_limit_gives_one_line(form, results, monkeypatch, capsys):
    monkeypatch.setitem(query_results.LIMITS, "memory_limit", "50MB")
    sql = "SELECT list(range || repeat('x', 1000)) FROM range(10000000)"
    monkeypatch.setattr(sys, "argv", ["query_results.py", results, sql, "--format", form])
    with pytest.raises(SystemExit) as caught:
        run_script(query_results.main, query_results.parse_args)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("error: Out of Memory") and err.count("\n") == 1
