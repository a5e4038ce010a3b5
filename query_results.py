"""Ask results files questions in SQL (DuckDB's).

    python query_results.py results/demo.jsonl \\
        "SELECT is_correct, COUNT(*) FROM df GROUP BY is_correct"
    python query_results.py results/a.jsonl results/b.jsonl --format csv \\
        "SELECT df.question, df.guess, df2.guess FROM df JOIN df2 USING (idx)"

The first file is the table df, the next are df2, df3, ...; "DESCRIBE df" lists the columns. A query
sees these tables alone: it reaches no other file and no network.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import duckdb

from errors import UserError, run_script

SCHEMA = """idx BIGINT, id VARCHAR, context VARCHAR, question VARCHAR, answer VARCHAR,
answers VARCHAR[], guess VARCHAR, is_correct BOOLEAN, exact_match DOUBLE, f1 DOUBLE,
confidence DOUBLE, no_answer_probability DOUBLE, time DOUBLE, num_tokens BIGINT,
num_new_tokens BIGINT, tokens_per_sec DOUBLE"""
COLUMNS = dict(column.split() for column in SCHEMA.split(","))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="JSONL, of an evaluation")
    parser.add_argument("sql", metavar="SQL", help="a query on df, df2, ...")
    about = "table (default) shortens what is long; csv and json, an object a line, do not"
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help=about)
    return parser.parse_intermixed_args()


def main(args: argparse.Namespace) -> None:
    database = duckdb.connect()
    for number, path in enumerate(args.results, start=1):
        load_results(database, path, table="df" if number == 1 else f"df{number}")
    database.execute("SET enable_external_access = false; SET lock_configuration = true")
    try:
        answer = database.sql(args.sql)
        if answer is None:
            raise UserError('the SQL is empty; give a query such as "SELECT AVG(f1) FROM df"')
        show(answer, args.format)
    except duckdb.Error as error:  # several lines, the last ones the query itself
        raise UserError(" ".join(str(error).split("\n\nLINE ")[0].split())) from error


def load_results(database: duckdb.DuckDBPyConnection, path: str, table: str) -> None:
    """Make a table of a results file. A kill can tear its last line, which is then left out;
    UserError names any other line that is no results row."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # A byte that is not UTF-8 becomes an escape that JSON does not know: a bad line.
    lines = data.decode(errors="backslashreplace").split("\n")
    database.execute(
        "CREATE TABLE parsed AS SELECT number, TRY(json_transform_strict(line, $columns)) AS row "
        "FROM (SELECT unnest($lines) AS line, generate_subscripts($lines, 1) AS number)",
        {"lines": lines, "columns": json.dumps(COLUMNS)},
    )
    bad = database.execute("SELECT MIN(number) FROM parsed WHERE row IS NULL").fetchone()[0]
    if bad is not None and (bad < len(lines) or bad == 1):
        needed = ", ".join(COLUMNS)
        raise UserError(f"{path} line {bad}: no results row; mend or remove it, it needs {needed}")
    select = "SELECT unnest(row) FROM parsed WHERE row IS NOT NULL"
    database.execute(f"CREATE TABLE {table} AS {select}; DROP TABLE parsed")


def show(answer: duckdb.DuckDBPyRelation, format: str) -> None:
    """Print a query's answer; csv with lists and dates as DuckDB writes them."""
    if format == "table":
        answer.show(max_rows=100)
    elif format == "csv":
        rows = answer.query("answer", "SELECT COLUMNS(*)::VARCHAR FROM answer").fetchall()
        csv.writer(sys.stdout, lineterminator="\n").writerows([answer.columns, *rows])
    else:
        rows = answer.query("a row", 'SELECT to_json("a row") FROM "a row"').fetchall()
        print(*(text + "\n" for [text] in rows), sep="", end="")


if __name__ == "__main__":
    run_script(main, parse_args)
