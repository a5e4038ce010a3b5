"""Score a model on a file: what the two evaluation scripts share."""

import argparse
import itertools
from collections.abc import Callable, Iterable

from tqdm import tqdm

from context_qa.answering import MAX_BATCH_TOKENS, Answer, Answerer
from context_qa.results import ResultsFile, print_scores, result_row
from errors import keep_inputs, positive_int
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.device import add_model_flags, choose_device, choose_dtype
from squad_utils import Example, read_examples


def parse_evaluation_args(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that `evaluate` reads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument("data", metavar="DATA", help="JSONL or SQuAD JSON file, or Hub name:split")
    parser.add_argument("output", metavar="OUTPUT", help="results, JSONL; OUTPUT.summary.json too")
    parser.add_argument(
        "--max_new_tokens", type=positive_int, default=64, help="tokens (default: 64)"
    )
    parser.add_argument(
        "--max_batch_tokens",
        type=positive_int,
        default=MAX_BATCH_TOKENS,
        help=f"tokens read together: bounds memory (default: {MAX_BATCH_TOKENS})",
    )
    parser.add_argument("--limit", type=positive_int, help="first questions only (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace results at OUTPUT")
    add_model_flags(parser)
    return parser


def evaluate(args: argparse.Namespace, prompt: Callable[[Example], tuple[str, str]]) -> None:
    """Answer every example of args.data by its prompt (prefix, suffix); write, score, print."""
    keep_inputs(args.output, args.data)
    examples = read_examples(args.data)[: args.limit]
    device = choose_device(args.device)
    with ResultsFile(args.output, args.overwrite) as results:
        dtype = choose_dtype(args.dtype, device)
        model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer, device, dtype)
        answerer = Answerer(model, tokenizer, args.max_new_tokens, args.max_batch_tokens)
        answers: dict[int, Answer] = {}

        def write(indices: Iterable[int]) -> None:
            results.write([result_row(i, examples[i], answers[i]) for i in indices])

        with tqdm(total=len(examples), unit="question") as progress:
            try:
                for batch in answerer.answer([prompt(example) for example in examples]):
                    answers |= batch
                    progress.update(len(batch))
                    in_order = itertools.count(len(results.rows))
                    write(itertools.takewhile(answers.__contains__, in_order))
            finally:  # Ctrl-C too keeps what was computed
                write(sorted(answers.keys() - {row["idx"] for row in results.rows}))
        print_scores(results.summarize(args, str(device))["scores"])
