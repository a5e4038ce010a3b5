"""Turn SQuAD into this project's training and evaluation files: context, prompt, response.

    python -m data.prepare_squad rajpurkar/squad:train data/Mamba-Fine-Tune/squad_train.jsonl
    python -m data.prepare_squad rajpurkar/squad:validation \\
        data/Mamba-Fine-Tune/squad_val_1k.jsonl --ids data/squad_val_1k_ids.txt

SOURCE may also be a local SQuAD v1.1 or v2.0 JSON file or a JSONL file. The response is the first
reference answer, or "I don't know." where there is none. Run it from the repository's root.
"""

from common.script import run_script

import argparse

from common.command_line import Parser, positive_int
from common.errors import UserError, printable
from common.input_files import read_text
from common.output_files import check_inputs_not_overwritten
from squad_utils import Example, read_examples, write_examples


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="SQuAD JSON, JSONL, or owner/name:split")
    parser.add_argument("output", metavar="OUTPUT", help="JSONL file to write")
    parser.add_argument("--ids", metavar="FILE", help="only these ids, one a line, in this order")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="only the first N (default: all)"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], [args.source, args.ids])
    examples = read_examples(args.source)
    if args.ids:
        examples = select_by_id(examples, args.ids, args.source)
    examples = examples[: args.limit]
    write_examples(examples, args.output)

    num_contexts = len({example.context for example in examples})
    num_answerable = sum(example.is_answerable for example in examples)
    print(f"{printable(args.output)}: {len(examples):,} rows")
    print(f"contexts: {num_contexts:,} ({len(examples) / num_contexts:.2f} questions each)")
    print(f"answerable: {num_answerable:,}, unanswerable: {len(examples) - num_answerable:,}")


def select_by_id(examples: list[Example], ids_file: str, source: str) -> list[Example]:
    """The examples that the file lists, in its order."""
    ids = read_text(ids_file, "a list of ids").splitlines()
    if not ids:
        raise UserError(f"{ids_file}: no id in it; give one a line")
    by_id = {example.id: example for example in examples}
    for number, example_id in enumerate(ids, start=1):
        if example_id not in by_id:
            raise UserError(
                f"{ids_file} line {number}: no question {example_id!r:.40} in {source}; "
                "give the source that the ids are from"
            )
    return [by_id[example_id] for example_id in ids]


if __name__ == "__main__":
    run_script(main, parse_args)
