"""The door for files that a stranger may have made: those of a model's folder.

What is read there is a file, which ends; JSON is of bounded size and depth before any library reads
it; and whatever a library raises while it parses is a refusal of the file. The block in which that
holds has the library's call alone: an error of our own stays a traceback.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError
from common.json_text import read_json

MAX_JSON_BYTES = 48 * 2**20  # the largest public tokenizers have 33 MB; Python takes 25 times it


def require_file(path: Path) -> None:
    """UserError unless the path, or what it links to, is a file: not a folder, a pipe, a device."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:  # links in a circle, a name that is too long
        raise UserError(f"{path!s:.300}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r}: no path ({error})") from error
    if not is_file:
        raise UserError(f"{path}: not a file")


def require_files(folder: Path) -> None:
    """UserError where a folder holds what is neither file nor folder, on which a reader may wait
    for ever, or JSON that `read_foreign_json` refuses."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            require_file(path)
        if path.suffix == ".json" and path.is_file():
            read_foreign_json(path)


def read_foreign_json(path: Path) -> object:
    """The JSON value in a file; UserError where it is no file, is too large or is no JSON."""
    require_file(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path}: has {size:,} bytes, more than any such file needs")
    return read_json(path)


def read_foreign_object(path: Path) -> dict:
    """As `read_foreign_json`; UserError too where the value is no object."""
    value = read_foreign_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, not a {type(value).__name__}")
    return value


@contextlib.contextmanager
def parsing(refusal: Callable[[str], str]) -> Iterator[None]:
    """Whatever a library raises, or its Rust code panics with, becomes a UserError: the refusal
    with the reason."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        raise UserError(refusal(reason[:120])) from error
