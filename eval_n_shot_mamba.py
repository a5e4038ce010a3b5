"""Score n-shot prompting on a file: each question after a fixed list of trivia, no context.

    python eval_n_shot_mamba.py state-spaces/mamba-130m data/Mamba-Fine-Tune/squad_val_1k.jsonl \\
        results/n_shot.jsonl

Writes one JSON object a question to OUTPUT as it goes, and OUTPUT.summary.json at the end. The same
command again goes on where it was cut off.
"""

from common.script import loading, run_script

import argparse

from context_qa.arguments import evaluation_parser, read_inputs
from context_qa.shots import n_shot_prompt
from squad_utils import prompt_parts


def parse_args() -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    parser.set_defaults(prompt_order="n_shot", negatives=None, constrain_to_context=False)
    parser.set_defaults(no_answer_threshold=None, tune_on=None)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    data = read_inputs(args.model, args.tokenizer, [args.data], args.output)
    with loading("PyTorch"):
        from context_qa.evaluation import evaluate
    prefix = n_shot_prompt()
    evaluate(args, data, lambda example: prompt_parts(prefix, example.question))


if __name__ == "__main__":
    run_script(main, parse_args)
