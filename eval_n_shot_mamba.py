"""Score n-shot prompting on a file: each question after a fixed list of trivia, no context.

    python eval_n_shot_mamba.py state-spaces/mamba-130m data/Mamba-Fine-Tune/squad_val_1k.jsonl \\
        results/n_shot.jsonl

Writes one JSON object per question to OUTPUT as it runs, and OUTPUT.summary.json at the end. The
same command resumes a run that was interrupted. """

from common.script import loading, run_script

import argparse

from context_qa.arguments import evaluation_parser, evaluation_values, read_inputs
from context_qa.shots import n_shot_prompt
from squad_utils import prompt_parts


def parse_args() -> argparse.Namespace:
    return evaluation_parser(__doc__).parse_args()


def main(args: argparse.Namespace) -> None:
    data = read_inputs(args.model, args.tokenizer, [args.data], args.output)
    with loading("PyTorch"):
        from context_qa.evaluation import EvaluationSettings, evaluate
    settings = EvaluationSettings(**evaluation_values(args), prompt_order="n_shot")
    prefix = n_shot_prompt()
    evaluate(settings, data, lambda example: prompt_parts(prefix, example.question))


if __name__ == "__main__":
    run_script(main, parse_args)
