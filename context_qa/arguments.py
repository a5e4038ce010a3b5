"""The arguments that scripts share, and their checks before a model is loaded.

Importing this module is fast, so that `--help` and errors in paths appear at once.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from common.command_line import Parser, positive_int, probability, seed, temperature, token_count
from common.errors import UserError
from common.json_text import read_json
from common.output_files import require_writable
from mamba_lm.folders import RECORD, require_model
from squad_utils import PROMPT_ORDERS, Example, read_examples

MAX_NEW_TOKENS = 64
MAX_BATCH_TOKENS = 8192
SLIDING_WINDOW = "sliding-window"  # a baseline in the place of a model


def evaluation_parser(description: str) -> Parser:
    """A parser with the arguments that `evaluate` reads."""
    parser = Parser(description)
    parser.add_argument("model", metavar="MODEL", help="local folder or Hub name")
    parser.add_argument("data", metavar="DATA", help="JSONL or SQuAD JSON file, or Hub name:split")
    parser.add_argument("output", metavar="OUTPUT", help="results, JSONL; OUTPUT.summary.json too")
    parser.add_argument(
        "--max_batch_tokens",
        type=positive_int,
        default=MAX_BATCH_TOKENS,
        metavar="N",
        help=f"tokens read together: bounds memory (default: {MAX_BATCH_TOKENS})",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="first N only (default: all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results at OUTPUT")
    add_model_flags(parser)
    return parser


def evaluation_values(args: argparse.Namespace) -> dict:
    """The fields of `EvaluationSettings` that both scripts have flags for."""
    names = ("model", "data", "output", "tokenizer", "device", "dtype", "max_new_tokens")
    names += ("max_batch_tokens", "limit", "overwrite")
    return {name: getattr(args, name) for name in names}


def add_console_flags(parser: Parser) -> None:
    """The flags of both scripts."""
    parser.add_argument(
        "--question", type=_question, metavar="Q", action="append", help="ask this; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object an answer")
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="draw each token at this temperature; 0 takes the likeliest (default: 0)",
    )
    parser.add_argument(
        "--top_k", type=positive_int, metavar="K", help="draw from the K likeliest (default: all)"
    )
    parser.add_argument(
        "--top_p",
        type=probability,
        metavar="P",
        help="draw from the likeliest that have P together (default: 1)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of draws (default: 0)")
    add_model_flags(parser)


def console_values(args: argparse.Namespace) -> dict:
    """The fields of `ConsoleSettings` that both scripts have flags for."""
    names = ("model", "tokenizer", "device", "dtype", "max_new_tokens")
    names += ("temperature", "top_k", "top_p", "seed")
    return {name: getattr(args, name) for name in names} | {"as_json": args.json}


def add_model_flags(parser: Parser) -> None:
    """The flags of every script that answers with a model."""
    parser.add_argument(
        "--max_new_tokens",
        type=token_count,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"default: {MAX_NEW_TOKENS}",
    )
    parser.add_argument("--tokenizer", help="folder, file or Hub name (default: the model's)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: auto"
    )


def _question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; ask something")
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:  # bytes that the locale's encoding lacks: they are UTF-8 all the same, or wrong
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise argparse.ArgumentTypeError("not UTF-8; convert it to UTF-8") from error


Data = dict[str, list[Example]]


def read_inputs(
    model: str, tokenizer: str | None, sources: Iterable[str | None], output: str
) -> Data:
    """The examples of each source that is given. UserError where one cannot be read, there is no
    such model or tokenizer, or nothing can be written where the output is to be."""
    data = {source: read_examples(source) for source in sources if source}
    require_writable(output)
    if model != SLIDING_WINDOW:
        require_model(model, tokenizer)
    return data


def trained_prompt_order(model: str) -> str:
    """The order of prompts that a local model was trained with here; else the default one.
    UserError where the record of its training cannot be read, or has an order that is unknown."""
    path = Path(model) / RECORD
    if not os.path.isfile(path):
        return PROMPT_ORDERS[0]
    record = read_json(path)
    arguments = record.get("arguments") if isinstance(record, dict) else None
    order = arguments.get("prompt_order") if isinstance(arguments, dict) else None
    if order is not None and order not in PROMPT_ORDERS:
        raise UserError(f"{path}: prompt order {order!r:.40} is unknown; correct it")
    return order or PROMPT_ORDERS[0]
