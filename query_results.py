"""Ask results files questions in SQL (DuckDB's).

    python query_results.py results/demo.jsonl \\
        "SELECT is_correct, COUNT(*) FROM df GROUP BY is_correct"
    python query_results.py results/demo.jsonl --format csv \\
        "SELECT question, answer, guess, f1 FROM df WHERE NOT is_correct ORDER BY confidence DESC"
    python query_results.py results/a.jsonl results/b.jsonl \\
        "SELECT AVG(df.f1), AVG(df2.f1) FROM df JOIN df2 USING (id)"

The first file is the table df, the next are df2, df3, ...; "DESCRIBE df" lists the columns. A query
reads these tables only: it reaches no other file and no network.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import duckdb

from errors import UserError, run_script

COLUMNS = {
    "idx": "BIGINT",
    "id": "VARCHAR",
    "context": "VARCHAR",
    "question": "VARCHAR",
    "answer": "VARCHAR",
    "answers": ["VARCHAR"],
    "guess": "VARCHAR",
    "is_correct": "BOOLEAN",
    "exact_match": "DOUBLE",
    "f1": "DOUBLE",
    "confidence": "DOUBLE",
    "no_answer_probability": "DOUBLE",
    "time": "DOUBLE",
    "num_tokens": "BIGINT",
    "num_new_tokens": "BIGINT",
    "tokens_per_sec": "DOUBLE",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="of an evaluation, JSONL")
    parser.add_argument("sql", metavar="SQL", help="a query on df, df2, ...")
    parser.add_argument(
        "--format",
        choices=("table", "csv", "json"),
        default="table",
        help="csv and json, an object a line, give every row, table the first and last of many "
        "(default: table)",
    )
    return parser.parse_intermixed_args()


def main(args: argparse.Namespace) -> None:
    database = duckdb.connect()
    for number, path in enumerate(args.results, start=1):
        load_results(database, path, "df" if number == 1 else f"df{number}")
    database.execute("SET enable_external_access = false; SET lock_configuration = true")
    try:
        answer = database.sql(args.sql)
        if answer is None:
            raise UserError('SQL is empty; give a query such as "SELECT AVG(f1) FROM df"')
        show(answer, args.format)
    except duckdb.Error as error:  # of many lines: what is wrong, and where it stands in the query
        raise UserError(" ".join(str(error).split("\n\nLINE ")[0].split())) from error


def load_results(database: duckdb.DuckDBPyConnection, path: str, table: str) -> None:
    """Make a table of a results file; UserError names the first line that is no results row."""
    database.execute(
        "CREATE TEMP TABLE parsed AS "
        "SELECT number, TRY(json_transform_strict(line, $columns)) AS row "
        "FROM (SELECT unnest($lines) AS line, generate_subscripts($lines, 1) AS number)",
        {"lines": read_lines(path), "columns": json.dumps(COLUMNS)},
    )
    [bad] = database.execute("SELECT MIN(number) FROM parsed WHERE row IS NULL").fetchone()
    if bad is not None:
        needed = ", ".join(COLUMNS)
        raise UserError(f"{path} line {bad}: no results row; mend or remove it, it needs {needed}")
    database.execute(f"CREATE TABLE {table} AS SELECT unnest(row) FROM parsed ORDER BY number")
    database.execute("DROP TABLE parsed")


def read_lines(path: str) -> list[str]:
    """The lines of a results file; the last is dropped if a kill tore it."""
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a results file") from error
    try:
        json.loads(last)
        lines.append(last)
    except ValueError:
        pass
    if not lines:
        raise UserError(f"{path}: no results in it; give the OUTPUT of an evaluation")
    return [line.decode(errors="backslashreplace") for line in lines]  # \xe9 is no JSON: a bad line


def show(answer: duckdb.DuckDBPyRelation, format: str) -> None:
    if format == "table":
        answer.show(max_rows=100)
    elif format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.fetchall())
    else:
        for [row] in answer.query("answer", "SELECT to_json(answer) FROM answer").fetchall():
            print(row)


if __name__ == "__main__":
    run_script(main, parse_args)
