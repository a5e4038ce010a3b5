"""Load a context once, ask it many questions.

    python prompt_mamba_with_context.py models/demo
    python prompt_mamba_with_context.py models/demo --context_file data/demo/passage.txt \\
        --question "Tell me the location of the Gentle Violin Hotel." --json
    cat questions.txt | python prompt_mamba_with_context.py models/demo --context_file c.txt --json

Without --question, questions come from standard input, one a line.
"""

from common.script import loading, run_script

import argparse

from common.command_line import Parser
from common.errors import UserError, warn
from context_qa.arguments import add_console_flags, console_values, trained_prompt_order
from context_qa.console.terminal import read_context
from mamba_lm.folders import require_model


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument(
        "--context_file", metavar="F", help="the context; - is standard input (default: typed)"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="with each answer, how much of the context the model let in, by Δ",
    )
    add_console_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.context_file == "-" and not args.question:
        raise UserError("--context_file -: the context is all of standard input; give --question")
    context = None if args.context_file is None else read_context(args.context_file)
    require_model(args.model, args.tokenizer)
    order = trained_prompt_order(args.model)
    if order != "context_first":
        warn(
            f"{args.model} was trained with --prompt_order {order}; here the context is read first,"
            " and only once"
        )
    with loading(f"PyTorch and {args.model}"):
        from context_qa.console.console import ConsoleSettings, load_console
        from context_qa.console.conversation import Conversation

        settings = ConsoleSettings(**console_values(args), explain=args.explain)
        console = load_console(settings)
    Conversation(console, "prompt_mamba_with_context").run(context, args.question)


if __name__ == "__main__":
    run_script(main, parse_args)
