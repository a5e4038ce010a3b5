"""Check output paths before the work starts, so that no file of the user is lost."""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.atomic_files import (
    encode_text,
    report_write_errors,
    require_file_or_nothing,
    write_atomically,
)
from common.errors import UserError


class Kind(NamedTuple):
    """A kind of file that this project writes.

    `name` is its name in messages, `is_ours` recognises a file of this kind by its content, read
    from its first byte on.
    """

    name: str
    is_ours: Callable[[BinaryIO], bool]


def check_inputs_not_overwritten(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path | None], are_folders: bool = False
) -> None:
    """Check that no output replaces an input of the same command, or another output.

    Args:
        outputs: paths that will be written.
        inputs: paths that are read; None and paths that do not exist (Hub names) are skipped.
        are_folders: whether the outputs are folders, which must not contain an input either.

    Raises:
        UserError: if two paths are the same file, by name, by a link or by a hard link.
    """
    outputs = list(map(str, outputs))
    read = [str(path) for path in inputs if path and os.path.exists(path)]
    for output, path in itertools.product(outputs, read):
        if _is_same(output, path) or (are_folders and _is_below(path, output)):
            where = "" if path == output else f" by {output}"
            raise UserError(
                f"{path}: is also an input and would be overwritten{where}; give another output"
            )
    for one, other in itertools.combinations(outputs, 2):
        if _is_same(one, other):
            raise UserError(f"{one}: is the same file as {other}; give two different outputs")


def _is_same(one: str, other: str) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_output(path: str | Path, kind: Kind | None, overwrite: bool = False) -> None:
    """Check that nothing is lost when a file of this kind is written.

    Args:
        path: the file that will be written.
        kind: what it will contain; None for files that cannot be told from a user's own, and that
            are never overwritten.
        overwrite: whether an existing file of this kind may be overwritten.

    Raises:
        UserError: unless the file does not exist, is empty, or is of this kind and `overwrite` is
            true; also if it cannot be read or is not a file.
    """
    require_file_or_nothing(path)
    if not os.path.exists(path):
        return
    with report_write_errors(path), open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return
        is_ours = kind is not None and kind.is_ours(stream)
    if kind is None:
        raise UserError(f"{path}: exists and is not overwritten; remove it or give another path")
    if not is_ours:
        message = f"contains something other than {kind.name} and is not overwritten"
        raise UserError(f"{path}: {message}; move it or give another path")
    if not overwrite:
        raise UserError(f"{path}: contains {kind.name}; give another path or overwrite it")


def write_output(
    output: str | Path, text: str, kind: Kind | None = None, overwrite: bool = False
) -> None:
    """Write a text file atomically if `check_output` allows it.

    A file that has this text already is left as it is. Raises a UserError as `check_output` and
    `write_atomically` do.
    """
    require_file_or_nothing(output)
    if not _has_content(output, text):
        check_output(output, kind, overwrite)
        write_atomically(output, text, lambda: check_output(output, kind, overwrite))


def _has_content(path: str | Path, text: str) -> bool:
    data = encode_text(text)
    if not os.path.exists(path) or os.path.getsize(path) != len(data):
        return False
    with report_write_errors(path):
        return Path(path).read_bytes() == data


def new_folder(output: str | Path) -> Path:
    """Create an empty output folder before the work starts; an empty one that exists is used.

    Raises:
        UserError: if the folder cannot be written, or contains anything.
    """
    folder = Path(output)
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        first = min((path.name for path in folder.iterdir()), default=None)
    if first is not None:
        raise UserError(f"{folder}: contains other files ({first}); give another folder")
    require_writable(folder)
    return folder


def require_writable(output: str | Path) -> None:
    """Raise a UserError unless files can be created in this folder, or in its nearest parent that
    exists."""
    with report_write_errors(output):
        place = Path(output).absolute()
        place = place if place.is_dir() else place.parent
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
