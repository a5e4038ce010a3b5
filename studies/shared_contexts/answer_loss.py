"""Does a model read its context? Held-out answer loss with true and with other contexts.

    python -m studies.shared_contexts.answer_loss MODEL DATA [--num_resamples 2000]

Prints the mean cross-entropy per answer token (end-of-text included) of the answerable questions in
DATA, on their own contexts and on other ones of the file that do not hold the answer, and the
difference with its 95 % interval by a bootstrap over contexts.
"""

from common.script import run_script

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import bootstrap
from tqdm import tqdm

from common.command_line import Parser
from context_qa.batches import Pairing, continuation
from context_qa.negatives import NegativeSampler
from mamba_lm.checkpoint import load_model, load_tokenizer
from mamba_lm.training.prefix_suffix import PrefixSuffixLM, collate
from squad_utils import PROMPT_ORDERS, Example, read_examples


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument("data", metavar="DATA", help="JSONL or SQuAD JSON file, or Hub name:split")
    parser.add_argument("--tokenizer", help="folder, file or Hub name (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=32, help="questions (default: 32)")
    parser.add_argument("--num_resamples", type=int, default=2000, help="default: 2000")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    examples = [example for example in read_examples(args.data) if example.is_answerable]
    tokenizer = load_tokenizer(args.model, args.tokenizer)
    model = PrefixSuffixLM(load_model(args.model))
    others = NegativeSampler(examples).draw_contexts(epoch=0)
    true, tokens = answer_losses(model, tokenizer, examples, args.batch_size)
    # The answer stays the target on the other context: this asks what the context contributes.
    replaced = [replace(e, context=context) for e, context in zip(examples, others, strict=True)]
    other, _ = answer_losses(model, tokenizer, replaced, args.batch_size)

    places = {context: place for place, context in enumerate({e.context: None for e in examples})}
    context = np.array([places[example.context] for example in examples])
    by_context = [np.bincount(context, weights) for weights in (true, other, tokens)]

    def difference(true, other, tokens, axis=-1):
        return (other.sum(axis) - true.sum(axis)) / tokens.sum(axis)

    interval = bootstrap(
        by_context,
        difference,
        paired=True,
        n_resamples=args.num_resamples,
        method="percentile",
        rng=0,
    ).confidence_interval
    print(f"{len(examples)} questions on {len(places)} contexts, {int(tokens.sum())} answer tokens")
    print(f"answer loss on true contexts      {true.sum() / tokens.sum():.4f}")
    print(f"answer loss on other contexts  {other.sum() / tokens.sum():.4f}")
    print(
        f"difference                        {difference(true, other, tokens):.4f}"
        f"   95 % interval {interval.low:.4f} to {interval.high:.4f}"
    )


@torch.inference_mode()
def answer_losses(
    model: PrefixSuffixLM, tokenizer, examples: Sequence[Example], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed cross-entropy of each example's answer, and its number of tokens."""
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].context))
    for start in tqdm(range(0, len(order), batch_size), unit="batch"):
        batch = order[start : start + batch_size]
        pairings = [Pairing(examples[place], examples[place].context) for place in batch]
        tokenized = [continuation(pairing, tokenizer, PROMPT_ORDERS[0]) for pairing in pairings]
        losses, rows = model.token_losses(**collate(tokenized))
        sums[batch] = np.bincount(rows, losses)
        counts[batch] = np.bincount(rows)
    return sums, counts


if __name__ == "__main__":
    run_script(main, parse_args)
