"""Writing files that are there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from errors import UserError


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
    path = Path(os.path.realpath(output))  # a link stays one
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with named_errors(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                # A name on a command line can hold what UTF-8 cannot.
                file.write(text.encode(errors="replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
