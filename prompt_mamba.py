"""Ask a language model trivia questions, after a fixed list of questions with answers.

    python prompt_mamba.py state-spaces/mamba-130m
    python prompt_mamba.py state-spaces/mamba-130m --shots shots.jsonl --show_prompt
    echo "Who wrote Hamlet?" | python prompt_mamba.py state-spaces/mamba-130m --json

Without --question, questions come from standard input, one a line. The list is read once; each
question is answered from the state after it.
"""

from common.script import loading, run_script

import argparse

from common.command_line import Parser
from context_qa.arguments import add_console_flags, console_values
from context_qa.shots import SHOTS, n_shot_prompt, read_shots
from mamba_lm.folders import require_model


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument(
        "--shots", metavar="FILE", help="JSONL of question, answer (default: eight built-in ones)"
    )
    parser.add_argument("--show_prompt", action="store_true", help="print what the model reads")
    add_console_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    shots = SHOTS if args.shots is None else read_shots(args.shots)
    require_model(args.model, args.tokenizer)
    with loading(f"PyTorch and {args.model}"):
        from context_qa.console.console import ConsoleSettings, load_console
        from context_qa.console.conversation import Conversation

        console = load_console(
            ConsoleSettings(**console_values(args), show_prompt=args.show_prompt)
        )
    conversation = Conversation(console, "prompt_mamba", loads_contexts=False)
    conversation.run(n_shot_prompt(shots), args.question)


if __name__ == "__main__":
    run_script(main, parse_args)
