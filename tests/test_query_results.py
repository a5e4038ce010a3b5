"""query_results.py: SQL on JSONL of any layout, which may be torn at the end but not elsewhere."""

from common.script import run_script

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import query_results
from context_qa.results.rows import Answer, result_row
from context_qa.results.summary import summary_path
from squad_utils import NO_ANSWER, Example

ROOT = Path(__file__).parents[1]
BY_CORRECT = "SELECT is_correct, COUNT(*) FROM df GROUP BY is_correct ORDER BY is_correct"


def row(idx: int, guess: str, answers: tuple[str, ...] = ("Oslo", "in Oslo")) -> dict:
    example = Example(f"q{idx}", "Bo is from\u2028Oslo, “Norway”.", "Where?", answers)
    return result_row(idx, example, Answer(guess, 0.5, 0.25, 0.125, 40, 2))


ROWS = [row(0, "Oslo"), row(1, "Rome"), row(2, NO_ANSWER, ()), row(3, 'the "Øst"\n')]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture
def results(tmp_path) -> Path:
    path = tmp_path / "results.jsonl"
    path.write_text(LINES, encoding="utf-8")
    return path


@pytest.fixture
def query(monkeypatch, capfd):
    """Run the script on these arguments; what it prints."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["query_results.py", *map(str, arguments)])
        query_results.main(query_results.parse_args())
        return capfd.readouterr().out

    return run


@pytest.fixture
def fail(monkeypatch, capfd):
    """Run the script on arguments that cannot work; its one line on stderr."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["query_results.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_script(query_results.main, query_results.parse_args)
        out, err = capfd.readouterr()
        assert caught.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def as_json(output: str) -> list[dict]:
    return [json.loads(line) for line in output.split("\n") if line]


def test_the_documented_command_prints_a_table(results):
    command = [sys.executable, "query_results.py", str(results), BY_CORRECT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    assert ["is_correct", "count_star()"] in cells
    assert ["false", "2"] in cells and ["true", "2"] in cells


def test_columns_are_those_of_a_results_row_and_keep_their_values(query, results):
    assert list(query_results.COLUMNS) == list(ROWS[0])
    assert as_json(query(results, "FROM df ORDER BY idx", "--format", "json")) == ROWS


def test_types_do_not_depend_on_the_rows(query, results):
    whole_numbers = ROWS[0] | {"answers": [], "time": 1, "f1": 0, "guess": "7"}
    results.write_text(json.dumps(whole_numbers) + "\n")
    columns = as_json(query(results, "DESCRIBE df", "--format", "json"))
    assert {c["column_name"]: c["column_type"] for c in columns} == query_results.COLUMNS


def test_csv_reads_back(query, results):
    sql = "SELECT idx, guess, answers, is_correct, NULL AS nothing FROM df ORDER BY idx"
    header, *rows = csv.reader(io.StringIO(query(results, sql, "--format", "csv")))
    assert header == ["idx", "guess", "answers", "is_correct", "nothing"]
    assert rows[0] == ["0", "Oslo", "[Oslo, in Oslo]", "true", ""]
    assert rows[3][1] == 'the "Øst"\n'


def test_json_keeps_numbers_numbers_and_equal_names_apart(query, results):
    sql = "SELECT 1.5 AS d, AVG(f1) AS f1, COUNT(*), COUNT(*) FROM df"
    [record] = as_json(query(results, "--format", "json", sql))
    assert list(record.values()) == [1.5, 0.5, 4, 4]


def test_csv_and_json_give_every_row_and_the_table_counts_those_left_out(query, results):
    results.write_text("".join(json.dumps(row(idx, "x" * 500)) + "\n" for idx in range(300)))
    sql = "SELECT idx, guess FROM df"
    assert [r["idx"] for r in as_json(query(results, sql, "--format", "json"))] == list(range(300))
    assert query(results, sql, "--format", "csv").count("\n") == 301
    table = query(results, sql)
    assert "300 rows" in table and len(table.splitlines()) < 120
    assert max(map(len, table.splitlines())) < 200


def test_several_files_are_df_df2_df3(query, results, tmp_path):
    for name, guess in (("b", "Rome"), ("c", "Bern")):
        (tmp_path / name).write_text(json.dumps(row(0, guess)) + "\n")
    sql = "SELECT df.guess AS a, df2.guess AS b, df3.guess AS c FROM df JOIN df2 USING (idx) "
    sql += "JOIN df3 USING (idx)"
    files = [results, tmp_path / "b", tmp_path / "c"]
    assert as_json(query(*files, "--format", "json", sql)) == [
        {"a": "Oslo", "b": "Rome", "c": "Bern"}
    ]
    assert query("--format", "csv", *files, "SHOW TABLES") == "name\ndf\ndf2\ndf3\n"


def test_a_line_torn_anywhere_is_dropped(query, results):
    whole = LINES.encode()
    start = whole.rindex(b"\n", 0, -1) + 1
    inside_a_letter = whole.index("Ø".encode(), start) + 1
    for end in (start, start + 1, inside_a_letter, len(whole) - 2):
        results.write_bytes(whole[:end])
        assert query(results, "SELECT COUNT(*) AS n FROM df", "--format", "csv") == "n\n3\n", end
    results.write_bytes(whole[:-1])  # only the newline is missing: the row is whole
    assert query(results, "SELECT COUNT(*) AS n FROM df", "--format", "csv") == "n\n4\n"


@pytest.mark.parametrize(
    "bad",
    [
        b'{"idx": 1, "id": "q',
        b"[]",
        b"null",
        json.dumps(ROWS[1] | {"f1": float("nan")}).encode(),
        json.dumps(ROWS[1] | {"time": float("inf")}).encode(),
        json.dumps(ROWS[1]).encode().replace(b"0.125", b"1e999"),
    ],
    ids=["torn", "list", "null", "NaN", "infinite", "too large"],
)
def test_any_other_line_that_is_not_an_object_is_named(fail, results, bad):
    lines = LINES.encode().splitlines()
    results.write_bytes(b"\n".join([lines[0], bad, *lines[2:]]) + b"\n")
    complaint = f"error: {results} line 2: not a JSON object; correct or remove the line\n"
    assert fail(results, BY_CORRECT) == complaint
    results.write_bytes(lines[0] + b"\n" + bad + b"\n")  # the last, but whole: no kill tore it
    assert fail(results, BY_CORRECT) == complaint


def test_a_line_in_another_encoding_is_named(fail, results):
    results.write_bytes(LINES.encode() + b'{"guess": "M\xe9xico"}\n')
    line = len(ROWS) + 1
    complaint = f"error: {results} line {line}: not UTF-8; convert the file to UTF-8\n"
    assert fail(results, BY_CORRECT) == complaint


def test_files_without_an_object(fail, results, tmp_path):
    assert "missing.jsonl: cannot be read (No such file" in fail(tmp_path / "missing.jsonl", "x")
    assert "cannot be read (Is a directory)" in fail(tmp_path, BY_CORRECT)
    results.write_text("")
    assert f"{results}: the file is empty; give JSONL" in fail(results, BY_CORRECT)
    for content in ('{"idx": 0', "[]", "notes"):
        results.write_text(content)
        assert f"{results} line 1: not a JSON object; give JSONL" in fail(results, BY_CORRECT)
    results.write_text("{}\n{}\n")
    assert f"{results}: its objects are empty" in fail(results, BY_CORRECT)


# Files of other layouts


def write(path: Path, objects: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def types(query, path: Path) -> dict[str, str]:
    columns = as_json(query(path, "DESCRIBE df", "--format", "json"))
    return {column["column_name"]: column["column_type"] for column in columns}


ORIGINAL = [  # as the original project's scripts write them
    {"idx": 0, "question": "Where?", "answer": "Oslo", "guess": "oslo", "is_correct": True}
    | {"time": 1.5, "num_tokens": 70, "tokens_per_sec": 46.7},
    {"idx": 1, "question": "Who?", "answer": NO_ANSWER, "guess": "Bo", "is_correct": False}
    | {"time": 2, "num_tokens": 71, "tokens_per_sec": 35.5},
]


def test_results_of_the_original_project_are_read(query, results):
    write(results, ORIGINAL)
    expected = {name: query_results.COLUMNS[name] for name in ORIGINAL[0]}
    assert types(query, results) == expected
    assert (
        query(results, BY_CORRECT, "--format", "csv")
        == "is_correct,count_star()\nfalse,1\ntrue,1\n"
    )


def test_data_is_read(query):
    data = ROOT / "data/demo/validation.jsonl"
    lines = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    assert as_json(query(data, "FROM df", "--format", "json")) == lines


def test_columns_that_a_user_added_come_after_the_others(query, results):
    write(results, [ROWS[0], ROWS[1] | {"note": "mine"}])
    sql = "SELECT guess, note FROM df"
    assert query(results, sql, "--format", "csv") == "guess,note\nOslo,\nRome,mine\n"
    assert list(types(query, results)) == [*ROWS[0], "note"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, None, False], "BOOLEAN"),
        ([1, None, 2**63 - 1], "BIGINT"),
        ([1, 2.5], "DOUBLE"),
        ([2**53, 0.5], "DOUBLE"),
        (["1", None], "VARCHAR"),
        ([[], ["a", "b"], None], "VARCHAR[]"),
        ([None, None], "JSON"),
        ([True, 1], "JSON"),
        ([1, "1"], "JSON"),
        ([2**63, 1], "JSON"),
        ([2**53 + 1, 0.5], "JSON"),  # no double is that number
        ([10**400], "JSON"),
        ([["a", None]], "JSON"),
        ([{"text": ["a"]}, []], "JSON"),
    ],
)
def test_a_type_is_that_of_all_rows_and_keeps_all_values(query, results, values, expected):
    """The first thousand rows alone would say otherwise."""
    values = [values[0]] * 3000 + values[1:]
    write(results, [{"x": value} for value in values])
    assert types(query, results) == {"x": expected}
    assert [r["x"] for r in as_json(query(results, "FROM df", "--format", "json"))] == values


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"is_correct": "perhaps"}, "JSON"),
        ({"answers": "Oslo"}, "JSON"),
        ({"num_tokens": 10**400}, "JSON"),
        ({"num_tokens": 40.5}, "DOUBLE"),
        ({"f1": 7}, "DOUBLE"),
        ({"guess": None}, "VARCHAR"),
    ],
)
def test_a_column_of_ours_keeps_its_type_where_its_values_fit(query, results, changed, expected):
    [(name, value)] = changed.items()
    write(results, [ROWS[0], ROWS[1] | changed])
    assert types(query, results) == query_results.COLUMNS | {name: expected}
    found = as_json(query(results, f"SELECT {name} FROM df", "--format", "json"))
    assert [row[name] for row in found] == [ROWS[0][name], value]


def test_names_that_sql_cannot_distinguish_or_write(query, results):
    odd = {"Guess": 1, "guess": 2, "guess_2": 3, "": 4, 'a"b; --': 5, "\ud800": 6}
    write(results, [odd])
    [row] = as_json(query(results, "FROM df", "--format", "json"))
    assert row == {"Guess": 1, "guess_2": 2, "guess_2_2": 3, "_": 4, 'a"b; --': 5, "\ufffd": 6}


def test_half_a_letter_becomes_the_replacement_character(query, results):
    write(results, [{"guess": "x\ud800\U0001f600", "deep": {"a": ["\udfff"]}}])
    [row] = as_json(query(results, "FROM df", "--format", "json"))
    assert row == {"guess": "x\ufffd\U0001f600", "deep": {"a": ["\ufffd"]}}


def test_json_has_no_nan(query, results):
    sql = "SELECT 'nan'::DOUBLE AS a, ['-inf'::FLOAT] AS b, 'NaN' AS c, 0.1 AS d"
    out = query(results, sql, "--format", "json")
    assert json.loads(out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None],
        "c": "NaN",
        "d": 0.1,
    }


def test_an_incomplete_file_is_called_so(monkeypatch, capfd, results, tmp_path):
    whole = write(tmp_path / "whole.jsonl", ROWS)
    summary = {"complete": True, "num_questions": 4}
    summary_path(whole).write_text(json.dumps(summary))
    summary_path(results).write_text(json.dumps(summary | {"complete": False}))
    results.write_text(LINES[: len(LINES) // 2])
    words = ["query_results.py", str(whole), str(results), "SELECT 1"]
    monkeypatch.setattr(sys, "argv", words)
    query_results.main(query_results.parse_args())
    found = "2 of 4 questions; its last line is torn"
    assert capfd.readouterr().err == f"warning: {results} is incomplete: {found}\n"


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT gues FROM df", 'Candidate bindings: "guess"'),
        ("SELECT * FROM df2", "df2 does not exist"),
        ("SELECT CAST(guess AS INT) FROM df", "Could not convert string 'Oslo'"),
        ("SELECT $1", "Values were not provided"),
        (" ", "the SQL is empty"),
    ],
)
@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_sql_errors_are_one_line(fail, results, sql, complaint, format):
    assert complaint in fail(results, sql, "--format", format)


def test_a_query_reaches_no_file_network_or_setting(fail, results, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    written = tmp_path / "written"
    for sql in (
        f"SELECT * FROM '{secret}'",
        f"SELECT * FROM read_text('{secret}')",
        f"SELECT * FROM glob('{tmp_path}/*')",
        f"COPY df TO '{written}'",
        f"EXPORT DATABASE '{written}'",
        f"ATTACH '{written}' AS other",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM 'https://example.org/a.csv'",
    ):
        assert "disabled" in fail(results, sql), sql
    assert "locked" in fail(results, "SET enable_external_access = true")
    assert "does not exist" in fail(results, "SELECT * FROM lines")  # a variable of the script's
    assert not written.exists()
