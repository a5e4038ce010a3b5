"""Score a trained model on context questions: exact match, F1 and abstention.

    python eval_mamba_with_context.py models/demo data/demo/validation.jsonl results/demo.jsonl
    python eval_mamba_with_context.py MODEL data/Mamba-Fine-Tune/squad_val_1k.jsonl results/1k.jsonl

Writes one JSON object a question to OUTPUT as it goes, and OUTPUT.summary.json at the end.
"""

import argparse

from context_qa.evaluation import evaluate, parse_evaluation_args
from errors import run_script
from squad_utils import PROMPT_ORDERS, prompt_parts


def parse_args() -> argparse.Namespace:
    parser = parse_evaluation_args(__doc__)
    parser.add_argument(
        "--prompt_order",
        choices=PROMPT_ORDERS,
        default=PROMPT_ORDERS[0],
        help="default: context_first",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    evaluate(args, lambda e: prompt_parts(e.context, e.question, args.prompt_order))


if __name__ == "__main__":
    run_script(main, parse_args)
