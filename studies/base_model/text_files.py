"""Documents of plain text files, compressed or not."""

import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

_TITLE = re.compile(r"= (.+) =\n?")


class Document(NamedTuple):
    """title: "" where the file has none. text: all of the document, its title's line included."""

    title: str
    text: str


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of .txt and .txt.xz files in UTF-8, in order. A line `= Title =` begins a new
    one; a file without such lines is one document. Raises UserError on a file that is not text."""
    for path in paths:
        title, lines = "", []
        for line in _lines(Path(path)):
            match = _TITLE.fullmatch(line)
            if match:
                yield from _document(title, lines)
                title, lines = match[1], []
            lines.append(line)
        yield from _document(title, lines)


def _document(title: str, lines: list[str]) -> Iterator[Document]:
    text = "".join(lines)
    if text.strip():
        yield Document(title, text)


def _lines(path: Path) -> Iterator[str]:
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8; convert the file to UTF-8") from error
