"""Score a trained model on context questions: exact match, F1 and abstention.

    python eval_mamba_with_context.py models/demo data/demo/validation.jsonl results/demo.jsonl
    python eval_mamba_with_context.py MODEL data/Mamba-Fine-Tune/squad_val_1k.jsonl results/1k.jsonl

Writes one JSON object per question to OUTPUT as it runs, and OUTPUT.summary.json. The same command
resumes a run. Baselines: MODEL sliding-window, and --prompt_order question_only (no context).
"""

from common.script import loading, run_script

import argparse

from common.command_line import probability
from context_qa.arguments import (
    evaluation_parser,
    evaluation_values,
    read_inputs,
    trained_prompt_order,
)
from context_qa.negatives import NEGATIVE_KINDS
from squad_utils import PROMPT_ORDERS, prompt_parts


def parse_args() -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    parser.add_argument(
        "--prompt_order",
        choices=PROMPT_ORDERS,
        help="default: the one that MODEL was trained with",
    )
    parser.add_argument(
        "--negatives",
        choices=NEGATIVE_KINDS,
        help="add answerable questions on another context, scored apart (default: none)",
    )
    parser.add_argument(
        "--constrain_to_context",
        action="store_true",
        help="guess spans of the context, or abstain (default: any text)",
    )
    threshold = parser.add_mutually_exclusive_group()
    threshold.add_argument(
        "--no_answer_threshold",
        type=probability,
        metavar="T",
        help="abstain where no_answer_probability > T (default: where greedy decoding does)",
    )
    threshold.add_argument(
        "--tune_on",
        metavar="FILE",
        help="the T with the best F1 on this other file (default: none)",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    prompt_order = args.prompt_order or trained_prompt_order(args.model)
    sources = (args.data, args.tune_on)
    data = read_inputs(args.model, args.tokenizer, sources, args.output)
    with loading("PyTorch"):
        from context_qa.evaluation import EvaluationSettings, evaluate
    settings = EvaluationSettings(
        **evaluation_values(args),
        prompt_order=prompt_order,
        negatives=args.negatives,
        constrain_to_context=args.constrain_to_context,
        no_answer_threshold=args.no_answer_threshold,
        tune_on=args.tune_on,
    )
    evaluate(settings, data, lambda e: prompt_parts(e.context, e.question, prompt_order))


if __name__ == "__main__":
    run_script(main, parse_args)
