"""Do shared contexts change answers? Each question's guess from a forked state, in batches, beside
that of the whole prompt read alone.

    python -m studies.shared_contexts.same_answers MODEL DATA --limit 1000

Where two guesses differ, prints the gap between the probabilities of the two tokens at which they
part: rounding decides a tie, and only a tie.
"""

from common.script import run_script

import argparse

import torch
from tqdm import tqdm

from common.command_line import Parser, positive_int
from context_qa.answering import Answerer
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.generate import decode, read
from squad_utils import prompt_parts, read_examples


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="local folder, Hub name or config file")
    parser.add_argument("data", metavar="DATA", help="JSONL or SQuAD JSON file, or Hub name:split")
    parser.add_argument("--tokenizer", help="folder, file or Hub name (default: the model's)")
    parser.add_argument("--max_new_tokens", type=positive_int, default=16, help="default: 16")
    parser.add_argument("--limit", type=positive_int, help="first questions only (default: all)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)  # for the weights, should MODEL be a config file
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer)
    answerer = Answerer(model, tokenizer, args.max_new_tokens)
    examples = read_examples(args.data)[: args.limit]
    prompts = [prompt_parts(example.context, example.question) for example in examples]
    shared = {}
    for batch in tqdm(answerer.answer(prompts), unit="batch"):
        shared |= batch
    different = 0
    for place, prompt in enumerate(tqdm(prompts, unit="question")):
        text, gap = alone(answerer, prompt, shared[place].text)
        if text != shared[place].text:
            different += 1
            print(f"{examples[place].id}: {shared[place].text!r}, alone {text!r}, gap {gap:.1e}")
    distinct = len({answer.text for answer in shared.values()})
    print(f"{len(prompts)} questions, {distinct} distinct guesses, {different} differ")


@torch.inference_mode()
def alone(answerer: Answerer, prompt: tuple[str, str], other: str) -> tuple[str, float]:
    """The guess of a prompt that is read from its first token on, and the smallest gap between the
    probabilities of its best two tokens on the way."""
    ids = [token for part in answerer.tokens.encode(prompt) for token in part]
    reading = read(answerer.model, [ids], vocab_size=answerer.vocab_size)
    [generation] = decode(
        answerer.model, reading, answerer.stop_ids, answerer.max_new_tokens, answerer.vocab_size
    )
    text = answerer.tokenizer.decode(generation.token_ids).strip()
    if text == other:
        return text, 0.0
    whole = torch.tensor([ids + generation.token_ids])
    after = answerer.model(whole)[0][0, len(ids) - 1 :, : answerer.vocab_size].softmax(-1)
    best = after.topk(2).values
    return text, float((best[:, 0] - best[:, 1]).min())


if __name__ == "__main__":
    run_script(main, parse_args)
