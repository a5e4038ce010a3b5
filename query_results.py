"""Ask results files questions in SQL (DuckDB's).

    python query_results.py results/demo.jsonl \\
        "SELECT is_correct, COUNT(*) FROM df GROUP BY is_correct"
    python query_results.py results/a.jsonl results/b.jsonl --format csv \\
        "SELECT df.question, df.guess, df2.guess FROM df JOIN df2 USING (idx)"

The first file is the table df, the next are df2, df3, ...; "DESCRIBE df" lists the columns. Any
JSONL of objects is read, results or not. A query sees these tables alone: it reaches no other file
and no network.
"""

from common.script import exit_on_signal_in_c, run_script, write_utf_8

import argparse
import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from common.command_line import Parser
from common.errors import UserError, printable
from common.json_text import plain_json
from context_qa.results.reading import read_objects, warn_if_incomplete
from context_qa.results.rows import COLUMNS as RESULT_COLUMNS
from context_qa.results.rows import is_kind

if TYPE_CHECKING:  # imported where it is used: `--help` needs none of it
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

SQL_TYPES = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR", list: "VARCHAR[]"}
LIMITS = {"memory_limit": "25%", "temp_directory": ""}  # of the machine's; nothing goes to disk
COLUMNS = {name: SQL_TYPES[column.kind] for name, column in RESULT_COLUMNS.items()}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="JSONL: results or other")
    parser.add_argument("sql", metavar="SQL", help="a query on df, df2, ...")
    about = "table (default) shortens what is long; csv and json, an object a line, do not"
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help=about)
    return parser.parse_intermixed_args()


def main(args: argparse.Namespace) -> None:
    with exit_on_signal_in_c():  # some queries, recursive ones among them, cannot be interrupted
        import duckdb

        database = duckdb.connect(config=LIMITS)
        for number, path in enumerate(args.results, start=1):
            load_results(database, path, table="df" if number == 1 else f"df{number}")
        database.execute("SET enable_external_access = false; SET lock_configuration = true")
        try:
            answer = database.sql(args.sql)
            if answer is None:
                raise UserError('the SQL is empty; give a query such as "SELECT AVG(f1) FROM df"')
            show(database, answer, args.format)
        except duckdb.Error as error:  # several lines, the last ones the query itself
            raise UserError(" ".join(str(error).split("\n\nLINE ")[0].split())) from error


def load_results(database: "DuckDBPyConnection", path: str, table: str) -> None:
    """Make a table of a JSONL file, its columns in the order in which they first appear, and warn
    if it is the file of an incomplete run. UserError as `read_objects`, and without any column."""
    objects, is_torn = read_objects(path)
    warn_if_incomplete(path, len(objects), is_torn)
    keys = list(dict.fromkeys(key for row in objects.values() for key in row))
    if not keys:
        raise UserError(f"{path}: its objects are empty; a table needs at least one column")
    values = {key: [row.get(key) for row in objects.values()] for key in keys}
    names = column_names(keys)
    types = [sql_type(key, values[key]) for key in keys]
    rows = (dict(zip(names, row, strict=True)) for row in zip(*values.values(), strict=True))
    lines = [valid_text(json.dumps(row, ensure_ascii=False)) for row in rows]
    database.execute(
        f"CREATE TABLE {table} AS SELECT unnest(json_transform_strict(line, $columns)) "
        "FROM (SELECT unnest($lines) AS line)",
        {"lines": lines, "columns": json.dumps(dict(zip(names, types, strict=True)))},
    )


def sql_type(name: str, values: Iterable) -> str:
    """The type that all values of a column fit: that of a result column, else the first of
    SQL_TYPES, else JSON. None, a missing value, fits all; a column of these alone is JSON."""
    present = [value for value in values if value is not None]
    kinds = [RESULT_COLUMNS[name].kind] if name in RESULT_COLUMNS else []
    kinds += SQL_TYPES if present else []
    fitting = (kind for kind in kinds if all(is_kind(value, kind) for value in present))
    return SQL_TYPES.get(next(fitting, None), "JSON")


def column_names(keys: Sequence[str]) -> list[str]:
    """A name for each key, which differs from the others in more than case and is not empty, as SQL
    needs it."""
    names: dict[str, str] = {}
    for key in keys:
        name = wanted = valid_text(key) or "_"
        number = 1
        while name.lower() in names:
            number += 1
            name = f"{wanted}_{number}"
        names[name.lower()] = name
    return list(names.values())


def valid_text(text: str) -> str:
    """The text, with the replacement character for each half of a surrogate pair."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def show(database: "DuckDBPyConnection", answer: "DuckDBPyRelation", format: str) -> None:
    """Print a query's answer; csv with lists and dates as DuckDB writes them. A terminal gets no
    control characters, a file or a pipe gets csv as it is; json has escapes for them."""
    if format == "table":
        table = io.StringIO()
        with contextlib.redirect_stdout(table):
            answer.show(max_rows=100)
        print(printable(table.getvalue(), keep="\n"), end="")
        return
    write_utf_8()
    database.execute("CREATE SCHEMA answer")  # a table of its own: a list would have no bound
    answer.create('answer."a row"')
    if format == "csv":
        writer, is_terminal = csv.writer(sys.stdout, lineterminator="\n"), sys.stdout.isatty()
        writer.writerow(map(printable, answer.columns) if is_terminal else answer.columns)
        for rows in fetched(database, 'SELECT COLUMNS(*)::VARCHAR FROM answer."a row"'):
            if is_terminal:
                rows = [[cell and printable(cell) for cell in row] for row in rows]
            writer.writerows(rows)
    else:
        for rows in fetched(database, 'SELECT to_json("a row") FROM answer."a row"'):
            print(*(plain_json(text) + "\n" for [text] in rows), sep="", end="")


def fetched(database: "DuckDBPyConnection", sql: str) -> Iterator[list[tuple]]:
    """The rows of a query, some at a time: all may not fit in memory."""
    cursor = database.execute(sql)
    while rows := cursor.fetchmany(10_000):
        yield rows


if __name__ == "__main__":
    run_script(main, parse_args)
