"""Load a context once, ask it many questions.

    python prompt_mamba_with_context.py models/demo
    python prompt_mamba_with_context.py models/demo --context_file data/demo/passage.txt \\
        --question "Tell me the location of the Gentle Violin Hotel." --json

Without --question, questions come from standard input, one a line.
"""

import argparse

from context_qa.console import (
    answer_questions,
    load_answerer,
    one_row,
    read_context,
    typed_questions,
)
from errors import UserError, positive_int, run_script
from mamba_lm.device import add_model_flags
from squad_utils import prompt_parts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument("--context_file", metavar="F", help="the context (default: typed in)")
    parser.add_argument("--question", metavar="Q", action="append", help="repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer")
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=64, help="tokens (default: 64)"
    )
    add_model_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if not all(question.strip() for question in args.question or ()):
        raise UserError("--question: is empty; ask something")
    context = read_context(args.context_file) if args.context_file else None
    answerer = load_answerer(args)  # before anything is typed
    context = context or read_context(None)
    state, num_tokens = one_row(answerer, prompt_parts(context, "")[0])
    questions = ((q, prompt_parts(context, q)[1]) for q in args.question or typed_questions())
    answer_questions(answerer, state, num_tokens, questions, args.json)


if __name__ == "__main__":
    run_script(main, parse_args)
