"""Write negatives: each answerable question on another context, where "I don't know." is right.

    python -m data.make_negatives data/demo/validation.jsonl results/negatives.jsonl
    python -m data.make_negatives questions.jsonl results/negatives.jsonl --contexts other.jsonl

No chosen context contains an answer of its question. With --contexts, all contexts come from that
file, so that they are new to a model that was trained on the first one.
"""

from common.script import run_script

import argparse

from common.command_line import Parser, seed
from common.errors import UserError, printable
from common.output_files import check_inputs_not_overwritten
from context_qa.negatives import NegativeSampler, make_negative
from squad_utils import read_examples, write_examples


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="JSONL or SQuAD JSON file, or Hub name:split")
    parser.add_argument("output", metavar="OUTPUT", help="JSONL file to write")
    parser.add_argument(
        "--contexts", metavar="DATA", help="where contexts come from (default: DATA)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], [args.data, args.contexts])
    questions = [example for example in read_examples(args.data) if example.is_answerable]
    pool = {example.context for example in read_examples(args.contexts or args.data)}
    drawn = NegativeSampler(questions, seed=args.seed, contexts=pool).draw_contexts(epoch=0)
    if None in drawn:
        raise UserError(
            f"{args.contexts or args.data}: no other context is fit for one of the questions"
        )
    negatives = [make_negative(*pair) for pair in zip(questions, drawn, strict=True)]
    write_examples(negatives, args.output)
    print(f"{printable(args.output)}: {len(negatives):,} negatives")


if __name__ == "__main__":
    run_script(main, parse_args)
