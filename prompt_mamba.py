"""Ask a language model trivia, after a fixed list of questions with answers.

    python prompt_mamba.py state-spaces/mamba-130m
    echo "Who wrote Hamlet?" | python prompt_mamba.py state-spaces/mamba-130m --json

Questions come from standard input, one a line. The list is read once; each question is asked from
the state after it.
"""

import argparse

from context_qa.console import answer_questions, load_answerer, one_row, typed_questions
from errors import positive_int, run_script
from mamba_lm.device import add_model_flags
from squad_utils import n_shot_parts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer")
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=64, help="tokens (default: 64)"
    )
    add_model_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    answerer = load_answerer(args)
    state, num_tokens = one_row(answerer, n_shot_parts("")[0])
    questions = ((question, n_shot_parts(question)[1]) for question in typed_questions())
    answer_questions(answerer, state, num_tokens, questions, args.json)


if __name__ == "__main__":
    run_script(main, parse_args)
