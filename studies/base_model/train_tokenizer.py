"""Train a small byte-level BPE tokenizer on text files.

    python -m studies.base_model.train_tokenizer wikipedia13k.txt.xz --output models/tokenizer-8k

Digits are merged like letters, as in GPT-2. In Wikipedia, the years that texts mention are then one
token each, so that a reader copies a date's year in one step. With --digits single every digit is a
token: ten embeddings that are always well trained, but four decisions for a year, whose first two
digits do not tell the years of a paragraph apart.
"""

from common.script import run_script

import argparse
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.atomic_files import atomic_folder
from common.command_line import Parser, positive_float, positive_int
from common.output_files import check_inputs_not_overwritten, new_folder
from mamba_lm.tokenizer import SAVED_FILES, load_tokenizer_at
from studies.base_model.text_files import read_documents

END_OF_TEXT = "<|endoftext|>"


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help=".txt or .txt.xz; `= Title =` begins a document")
    add("--output", required=True, metavar="DIR", help="folder of the new tokenizer")
    add("--vocabulary", type=positive_int, default=8192, metavar="N", help="default: 8192")
    add("--digits", choices=("merged", "single"), default="merged", help="default: merged")
    add("--megabytes", type=positive_float, default=50.0, metavar="N",
        help="of text to learn from, every k-th document of all (default: 50)")  # fmt: skip
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], args.texts)
    new_folder(args.output)
    texts = sample((document.text for document in read_documents(args.texts)), args.megabytes * 1e6)
    train_tokenizer(texts, args.vocabulary, args.digits, args.output)
    print(f"tokenizer of {args.vocabulary:,} tokens written to {args.output}")


def sample(texts: Iterable[str], size: float) -> list[str]:
    """About `size` bytes of texts: every k-th one, k as small as that allows. Returns them all
    where they are no more than that."""
    kept, total, step = [], 0, 1
    for place, text in enumerate(texts):
        if place % step == 0:
            kept.append(text)
            total += len(text.encode())
        while total > size and len(kept) > 1:
            kept, step = kept[::2], 2 * step
            total = sum(len(text.encode()) for text in kept)
    return kept


def train_tokenizer(texts: Iterable[str], vocabulary: int, digits: str, output: str) -> None:
    """Write the folder of a tokenizer of `vocabulary` ids, fewer where texts are few. End-of-text
    has id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = bytes_
    if digits == "single":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), bytes_])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(texts), trainer)
    with atomic_folder(output, SAVED_FILES) as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(
            folder
        )
    load_tokenizer_at(Path(output))  # it is what this project loads


def _lines(texts: Iterable[str]) -> Iterator[str]:
    return itertools.chain.from_iterable(text.splitlines(keepends=True) for text in texts)


if __name__ == "__main__":
    run_script(main, parse_args)
