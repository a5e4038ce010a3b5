"""Files that are read with one complaint, and files and folders that are written whole or not."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from errors import CONTROLS, UserError

MODEL_FILES = (  # a model's configuration and weights, in one file or in several
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def read_text(path: str | Path, wanted: str) -> str:
    """A file's text; UserError where it cannot be read, naming what is `wanted`, or is not UTF-8,
    naming the line."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give {wanted}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8; convert the file to UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path!r}: no path ({error}); give {wanted}") from error


MAX_NESTING = 64  # of JSON: what is deeper makes other code run out of stack later


def read_json(path: str | Path, wanted: str = "a JSON file") -> object:
    """The JSON value in a file that anybody may have written; UserError where it cannot be read, or
    `parse_json` refuses it."""
    return parse_json(read_text(path, wanted), str(path))


def parse_json(text: str | bytes, place: str) -> object:
    """The JSON value of a text; UserError that names the place where it is none, or is nested too
    deep, or has a number of thousands of digits."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{place}: is nested too deep") from error
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if _is_nested_too_deep(value):
        raise UserError(f"{place}: is nested more than {MAX_NESTING} deep")
    return value


def _is_nested_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def json_line(value: object) -> str:
    """A value as JSON on one line that a terminal may get: NaN and infinities, which JSON lacks,
    are null, and control characters are escaped."""
    return plain_json(json.dumps(value, ensure_ascii=False))


def plain_json(text: str) -> str:
    """JSON as Python or DuckDB writes it, in the form of `json_line`."""
    text = _JSON_WORD.sub(lambda found: _PLAIN_WORDS.get(found[0][-1], found[0]), text)
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_JSON_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|-?(?:NaN|Infinity)|[\t\n\r]')
_PLAIN_WORDS = {"N": "null", "y": "null", "\t": " ", "\n": " ", "\r": " "}  # by their last letter


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """An OSError as a UserError that names the file."""
    try:
        yield
    except OSError as error:
        complaint = f"{path}: cannot be written ({error.strerror}); mend that or give another path"
        raise UserError(complaint) from error


def write_whole(output: str | Path, text: str) -> None:
    """Write a text file in UTF-8, with its parent folders, in one step: what was there before stays
    if anything goes wrong. UserError where it cannot be written."""
    if os.path.exists(output) and not os.path.isfile(output):  # a folder, a pipe, a device
        raise UserError(f"{output}: cannot be written (not a file); give another path")
    with named_errors(output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        os.close(replaced(output, text))


def require_writable(output: str | Path) -> None:
    """UserError unless files can be made in this folder, or in the one that will hold it."""
    with named_errors(output):
        place = Path(output).absolute()
        place = place if place.is_dir() else place.parent
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()


def replaced(output: str | Path, text: str) -> int:
    """Write as `write_whole`, in a folder that is there; the new file's descriptor, on which the
    lock is that `locked` takes. Raises OSError."""
    path = Path(os.path.realpath(output))  # a link stays one
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode)
        locked(descriptor)
        # A name on a command line can hold what UTF-8 cannot.
        write_at(descriptor, text.encode(errors="replace"), 0)
        os.replace(partial, path)
    except BaseException:
        os.close(descriptor)
        partial.unlink(missing_ok=True)
        raise
    return descriptor


def write_at(descriptor: int, data: bytes, place: int) -> None:
    """Write all of the data at a place in a file, and have it on the disk."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], place + written)
    os.fsync(descriptor)


def locked(descriptor: int) -> bool:
    """Whether this process is now the one that has the file's lock, until it closes it; True too
    where a file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_at(descriptor: int, path: str | Path) -> bool:
    """Whether an open file is still the one that stands at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_folder(folder: str | Path, replaced: Sequence[str] = MODEL_FILES) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends without an error.

    A new folder appears whole, by one rename. In one that exists (it may hold checkpoints, or be a
    mount of its own) the old config.json goes first and the new one comes last: without it a folder
    is not a model. What else matches the patterns `replaced` goes too.
    """
    folder = Path(folder).absolute()
    name = f".{folder.name}.partial-{os.getpid()}"
    partial = folder / name if folder.is_dir() else folder.with_name(name)
    try:
        partial.mkdir(parents=True)
        yield partial
        if partial.parent == folder:
            (folder / "config.json").unlink(missing_ok=True)
            for pattern in replaced:
                for stale in folder.glob(pattern):
                    stale.unlink()
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(folder / path.name)
        else:
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
