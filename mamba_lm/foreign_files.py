"""Read untrusted files, such as those of a model's folder.

Only regular files are read, because reading a pipe or a device may never end. JSON is limited in
size and depth before a library reads it. Any error that a library raises while it parses becomes a
UserError that names the file; `parsing` blocks contain the library's call alone, so that our own
bugs still give a traceback.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError
from common.json_text import read_json

MAX_JSON_BYTES = 48 * 2**20  # the largest public tokenizers have 33 MB, parsed 25 times that


def require_file(path: Path) -> None:
    """Raise a UserError unless the path is a file or a link to one: no folder, pipe or device."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:  # a cycle of links, a name that is too long
        raise UserError(f"{path!s:.300}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r}: is not a valid path ({error})") from error
    if not is_file:
        raise UserError(f"{path}: not a file")


def require_files(folder: Path) -> None:
    """Raise a UserError if a folder contains a pipe or a device, which a library could wait for
    forever, or JSON that `read_foreign_json` refuses."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            require_file(path)
        if path.suffix == ".json" and path.is_file():
            read_foreign_json(path)


def read_foreign_json(path: Path) -> object:
    """Read the JSON value in an untrusted file.

    Raises:
        UserError: if the path is not a file, the file is larger than `MAX_JSON_BYTES`, or its
            content is not JSON or is nested too deep.
    """
    require_file(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path}: has {size:,} bytes, more than the limit of {MAX_JSON_BYTES:,}")
    return read_json(path)


def read_foreign_object(path: Path) -> dict:
    """Read a JSON object as `read_foreign_json` does. Raises a UserError for other values too."""
    value = read_foreign_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must contain a JSON object, not a {type(value).__name__}")
    return value


@contextlib.contextmanager
def parsing(message: Callable[[str], str]) -> Iterator[None]:
    """Turn any exception of a library in this block, a panic of Rust code too, into a UserError.

    Args:
        message: takes the reason, one line of at most 120 characters, and returns the message.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        raise UserError(message(reason[:120])) from error
