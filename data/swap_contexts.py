"""Ask every question over another context, where "I don't know." is the right answer.

    python -m data.swap_contexts data/demo/validation.jsonl results/swapped.jsonl
    python -m data.swap_contexts questions.jsonl results/swapped.jsonl --contexts other.jsonl

Only answerable questions are taken; no chosen context holds one of a question's answers. With
--contexts, all contexts come from that file, so that they are new to a model trained on the first.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from errors import UserError, run_script
from squad_utils import NO_ANSWER, NegativeSampler, read_examples


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="JSONL or SQuAD JSON file, or Hub name:split")
    parser.add_argument("output", metavar="OUTPUT", help="JSONL in the Oxen layout")
    parser.add_argument("--contexts", metavar="DATA", help="their source (default: DATA)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    questions = [example for example in read_examples(args.data) if example.is_answerable]
    pool = read_examples(args.contexts) if args.contexts else []
    # The pool's own examples only lend their contexts: the questions must not be asked on theirs.
    lenders = [replace(example, answers=()) for example in pool]
    sampler = NegativeSampler([*questions, *lenders], seed=args.seed)
    if args.contexts:
        sampler.pool = sorted({example.context for example in pool})
    swapped = list(zip(questions, sampler.contexts(epoch=0), strict=False))
    if any(context is None for _, context in swapped):
        raise UserError(f"{args.contexts or args.data}: too few contexts to swap")
    output = Path(args.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", encoding="utf-8") as file:
            for example, context in swapped:
                row = {"context": context, "prompt": example.question, "response": NO_ANSWER}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from error
    print(f"{len(swapped):,} questions over other contexts: {args.output}")


if __name__ == "__main__":
    run_script(main, parse_args)
