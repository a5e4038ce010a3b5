"""Make one memory-mapped token file of any text files.

    python -m studies.base_model.pack wikipedia13k.txt.xz --tokenizer models/tokenizer-8k \\
        --output data/wikipedia13k

Writes OUTPUT.bin, the token ids as little-endian uint16, each document's followed by end-of-text,
and OUTPUT.json: where documents begin and how many bytes of text they have.
"""

from common.script import run_script

import argparse
import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.command_line import Parser, positive_int
from common.errors import UserError
from common.json_text import read_json
from common.output_files import check_inputs_not_overwritten, check_output, write_output
from mamba_lm.tokenizer import encode, load_tokenizer_at, vocabulary_bound
from studies.base_model.processes import process_pool
from studies.base_model.text_files import read_documents

TOKEN = np.dtype("<u2")


class Packed(NamedTuple):
    """A token file. tokens: uint16, memory-mapped. starts: of each document, in tokens, and the
    number of all tokens. num_bytes: of each document's text in UTF-8."""

    tokens: np.ndarray
    starts: list[int]
    num_bytes: list[int]


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help=".txt or .txt.xz; `= Title =` begins a document")
    add("--tokenizer", required=True, metavar="DIR", help="folder or tokenizer.json file")
    add("--output", required=True, metavar="NAME", help="NAME.bin and NAME.json are written")
    add("--processes", type=positive_int, default=os.cpu_count(), metavar="N", help="default: all")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    outputs = (f"{args.output}.bin", f"{args.output}.json", _partial(args.output))
    check_inputs_not_overwritten(outputs, args.texts)
    for output in outputs:
        check_output(output, None)
    texts = (document.text for document in read_documents(args.texts))
    tokens, documents = pack(texts, args.tokenizer, args.output, args.processes)
    print(f"{tokens:,} tokens of {documents:,} documents written to {args.output}.bin")


def pack(texts: Iterable[str], tokenizer: str, output: str, processes: int) -> tuple[int, int]:
    """Write OUTPUT.bin and OUTPUT.json; returns the number of tokens and of documents. Raises
    UserError where the vocabulary does not fit uint16."""
    loaded = load_tokenizer_at(Path(tokenizer))
    if vocabulary_bound(loaded) > 2**16:
        raise UserError(f"{tokenizer}: has more than {2**16:,} token ids, too many for uint16")
    end = np.array([loaded.eos_token_id], TOKEN).tobytes()
    starts, num_bytes = [0], []
    partial = Path(_partial(output))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file, process_pool(processes) as pool:
            tokenize = functools.partial(_tokenize, tokenizer)
            for size, ids in pool.imap(tokenize, texts, chunksize=8):
                file.write(ids + end)
                starts.append(starts[-1] + (len(ids) + len(end)) // TOKEN.itemsize)
                num_bytes.append(size)
        if not num_bytes:
            raise UserError(f"{output}: no text to write")
        check_output(f"{output}.bin", None)
        partial.replace(f"{output}.bin")
    finally:
        partial.unlink(missing_ok=True)
    write_output(f"{output}.json", json.dumps({"starts": starts, "num_bytes": num_bytes}) + "\n")
    return starts[-1], len(num_bytes)


def _partial(output: str) -> str:
    return f"{output}.bin.partial"


def _tokenize(tokenizer: str, text: str) -> tuple[int, bytes]:
    [ids] = encode(_load_once(tokenizer), [text])
    return len(text.encode()), np.array(ids, TOKEN).tobytes()


@functools.cache
def _load_once(tokenizer: str):
    return load_tokenizer_at(Path(tokenizer))


def read_packed(name: str) -> Packed:
    """The token file that `pack` wrote as NAME. Raises UserError where it is not whole."""
    about = read_json(f"{name}.json")
    try:
        tokens = np.memmap(f"{name}.bin", TOKEN, "r")
        packed = Packed(tokens, about["starts"], about["num_bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}.bin, {name}.json: no token file of pack.py ({error})") from error
    if packed.starts[-1] != len(tokens) or len(packed.starts) != len(packed.num_bytes) + 1:
        raise UserError(f"{name}.bin: has {len(tokens):,} tokens, {name}.json says otherwise")
    return packed


def read_all(names: Sequence[str]) -> Packed:
    """Several token files as one, the documents in this order. Raises UserError."""
    files = [read_packed(name) for name in names]
    if len(files) == 1:
        return files[0]
    starts = [0]
    for file in files:
        end = starts[-1]
        starts += [end + start for start in file.starts[1:]]
    return Packed(
        np.concatenate([file.tokens for file in files]),
        starts,
        [size for file in files for size in file.num_bytes],
    )


def read_texts(packed: Packed, tokenizer) -> Iterator[str]:
    """The documents' texts again: byte-level tokens lose nothing."""
    for start, end in zip(packed.starts, packed.starts[1:], strict=False):
        yield tokenizer.decode(packed.tokens[start : end - 1], clean_up_tokenization_spaces=False)


def number_of_documents(packed: Packed, tokens: int) -> int:
    """How many of the last documents have this many tokens together, or a few more."""
    starts: Sequence[int] = packed.starts
    return sum(start > starts[-1] - tokens for start in starts[:-1]) + 1


if __name__ == "__main__":
    run_script(main, parse_args)
