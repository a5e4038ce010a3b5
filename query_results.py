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

import duckdb

from context_qa.results import FIELDS, read_results
from errors import UserError, run_script

SQL_TYPES = {int: "BIGINT", str: "VARCHAR", list: "VARCHAR[]", bool: "BOOLEAN", float: "DOUBLE"}
COLUMNS = {name: SQL_TYPES[kind] for name, kind in FIELDS.items()}


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
    lines = [json.dumps(row) for row in read_results(path)]
    database.execute(
        f"CREATE TABLE {table} AS SELECT unnest(json_transform_strict(line, $columns)) "
        "FROM (SELECT unnest($lines) AS line)",
        {"lines": lines, "columns": json.dumps(COLUMNS)},
    )


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
