"""Asking questions at a prompt: what the two prompt scripts share."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from context_qa.answering import Answerer
from context_qa.results import Answer
from errors import UserError
from mamba_lm.checkpoint import NOTE, load_model_and_tokenizer
from mamba_lm.device import choose_device, choose_dtype
from mamba_lm.model import MambaState


def load_answerer(args: argparse.Namespace) -> Answerer:
    """The model that the command line names, ready to answer; its note goes to stderr."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer, device, dtype)
    note = Path(args.model) / NOTE
    if note.is_file():
        print(note.read_text(encoding="utf-8", errors="replace").strip(), file=sys.stderr)
    return Answerer(model, tokenizer, args.max_new_tokens)


def read_context(path: str | None) -> str:
    """The context in a file, or what is typed up to an empty line."""
    if path is not None:
        try:
            context = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
    else:
        _say("Context, ended by an empty line:")
        lines = iter(_line, "")
        context = "".join(iter(lambda: next(lines, "\n"), "\n"))
    if not context.strip():
        raise UserError(f"{path or 'standard input'}: the context is empty")
    return context.strip()


def typed_questions() -> Iterator[str]:
    """Questions from standard input, one a line, until its end."""
    while True:
        if sys.stdin.isatty():
            _say("Question (Ctrl-D ends): ", end="")
        line = _line()
        if not line:
            return
        if line.strip():
            yield line.strip()


def answer_questions(
    answerer: Answerer,
    state: MambaState,
    num_tokens: int,
    questions: Iterable[tuple[str, str]],
    as_json: bool,
) -> None:
    """Print an answer to each (question, suffix), all asked from the same state of one row."""
    for question, suffix in questions:
        answer = answerer.ask(state, [suffix], [num_tokens])[0]
        print(_as_json(question, answer) if as_json else _as_text(answer), flush=True)


def one_row(answerer: Answerer, prefix: str) -> tuple[MambaState, int]:
    """The state after a prefix and the prefix's length in tokens; on stderr, how long that is."""
    state, [length] = answerer.read_prefixes([prefix])
    _say(f"read {length} tokens into a state of {state.num_bytes / 1e3:,.0f} kB")
    return state, length


def _line() -> str:
    try:
        line = sys.stdin.readline()
        line.encode()  # what is not UTF-8 fails here if the locale let it through
    except UnicodeError as error:
        raise UserError("standard input: not UTF-8; convert it to UTF-8") from error
    return line


def _as_json(question: str, answer: Answer) -> str:
    record = {
        "question": question,
        "answer": answer.text,
        "confidence": answer.confidence,
        "no_answer_probability": answer.no_answer_probability,
        "time": answer.seconds,
        "num_new_tokens": answer.num_new_tokens,
    }
    return json.dumps(record, ensure_ascii=False)


def _as_text(answer: Answer) -> str:
    return (
        f"{answer.text}   (confidence {answer.confidence:.2f}, "
        f"no answer {answer.no_answer_probability:.2f}, {answer.seconds:.2f} s)"
    )


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
