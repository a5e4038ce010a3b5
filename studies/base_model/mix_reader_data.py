"""Make one training file of several question answering files, for the root's training script.

    python -m studies.base_model.mix_reader_data squad/train_82k.jsonl.xz qa/*.jsonl.xz \\
        --output data/reader.jsonl

Reads JSONL with context, question, answers, compressed or not. A question is skipped where its
first answer is not in its context. Ids and titles begin with the file's name, so that no two files
share one; a file's answers are cut to the first, which is what training reads.
"""

from common.script import run_script

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from common.command_line import Parser, positive_int
from common.errors import UserError
from common.json_text import parse_json
from common.output_files import check_inputs_not_overwritten, write_output


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".jsonl or .jsonl.xz")
    add("--output", required=True, metavar="FILE", help="JSONL")
    add("--longest", type=positive_int, default=2000, metavar="N",
        help="characters of a context; longer ones are skipped (default: 2000)")  # fmt: skip
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], args.files)
    rows = []
    for path in map(Path, args.files):
        found = list(read_rows(path))
        kept = [row for row in found if is_fit(row, args.longest)]
        rows += [named(row, path.name.split(".")[0]) for row in kept]
        print(f"{path}: {len(kept):,} of {len(found):,} questions")
    write_output(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows):,} questions written to {args.output}")


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file. Raises UserError naming the line that is none."""
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                row = parse_json(line, f"{path} line {number}")
                if not isinstance(row, dict) or not {"context", "question", "answers"} <= set(row):
                    raise UserError(f"{path} line {number}: context, question, answers are needed")
                yield row
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def is_fit(row: dict, longest: int) -> bool:
    """Whether the context holds the answer that is to be learnt, and is not too long."""
    answer = first_answer(row)
    return answer is not None and answer in row["context"] and len(row["context"]) <= longest


def first_answer(row: dict) -> str | None:
    answers = row["answers"]
    answers = answers.get("text") if isinstance(answers, dict) else answers
    first = answers[0] if answers else None
    text = first.get("text") if isinstance(first, dict) else first
    return text.strip() or None if isinstance(text, str) else None


def named(row: dict, name: str) -> dict:
    return {
        "id": f"{name}/{row.get('id', '')}",
        "title": f"{name}/{row.get('title') or ''}",
        "context": row["context"],
        "question": row["question"],
        "answers": [first_answer(row)],
    }


if __name__ == "__main__":
    run_script(main, parse_args)
