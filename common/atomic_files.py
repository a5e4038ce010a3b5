"""Write files and folders atomically: after an error, the previous content is still there."""

import contextlib
import fcntl
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.errors import UserError

MODEL_FILES = (  # a model's configuration and weights, in one file or in several
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


@contextlib.contextmanager
def report_write_errors(path: str | Path) -> Iterator[None]:
    """Raise an OSError of this block as a UserError that names the path."""
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}); fix that or give another path"
        raise UserError(message) from error


def write_atomically(
    output: str | Path, text: str, check: Callable[[], None] = lambda: None
) -> None:
    """Write a UTF-8 text file, and its parent folders, in one step.

    Args:
        output: the file. What it contained before stays if anything fails.
        text: the new content.
        check: called just before the file is replaced; an error that it raises stops the write.

    Raises:
        UserError: if the file cannot be written, or if the path is not a file.
    """
    require_file_or_nothing(output)
    with report_write_errors(output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        os.close(replace_file(output, text, check))


def require_file_or_nothing(output: str | Path) -> None:
    """Raise a UserError if the path exists and is not a file: a folder, a pipe, a device."""
    if os.path.exists(output) and not os.path.isfile(output):
        raise UserError(f"{output}: cannot be written (not a file); give another path")


def encode_text(text: str) -> bytes:
    """Encode text as UTF-8. A name from a command line may contain what UTF-8 cannot encode."""
    return text.encode(errors="replace")


def replace_file(output: str | Path, text: str, check: Callable[[], None] = lambda: None) -> int:
    """Write as `write_atomically`, into an existing folder.

    Returns:
        The descriptor of the new file, which has the lock that `try_lock` takes. The caller closes
        it.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(os.path.realpath(output))  # a link stays a link
    partial, descriptor = _open_partial(path)
    try:
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode)
        try_lock(descriptor)
        write_at(descriptor, encode_text(text), 0)
        check()
        os.replace(partial, path)
    except BaseException:
        os.close(descriptor)
        partial.unlink(missing_ok=True)
        raise
    return descriptor


def _open_partial(path: Path) -> tuple[Path, int]:
    """Create a new file beside a path; its path and its descriptor."""
    for number in itertools.count(os.getpid()):
        partial = path.with_name(f"{path.name}.{number}.partial")
        with contextlib.suppress(FileExistsError):
            return partial, os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all data at an offset in bytes, and wait until it is on the disk."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)
    os.fsync(descriptor)


def try_lock(descriptor: int) -> bool:
    """Lock a file for this process until the descriptor is closed, without waiting.

    Returns:
        False if another process has the lock. True also on file systems without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def is_current_file(descriptor: int, path: str | Path) -> bool:
    """Whether an open file is the one that the path leads to now: not a removed or replaced one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def atomic_folder(folder: str | Path, stale: Sequence[str] = MODEL_FILES) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends without an error.

    A new folder appears complete, by one rename. In an existing one, which may contain checkpoints
    or be a mount, config.json is removed first and written last: a folder without it is not a
    model.

    Args:
        folder: the folder to create or to update.
        stale: patterns of the files that are removed from an existing folder.

    Raises:
        UserError: if a file cannot be written.
    """
    folder = Path(folder).absolute()
    name = f".{folder.name}.partial-{os.getpid()}"
    partial = folder / name if folder.is_dir() else folder.with_name(name)
    with report_write_errors(folder):
        partial.mkdir(parents=True)
    try:
        yield partial
        if partial.parent == folder:
            (folder / "config.json").unlink(missing_ok=True)
            for pattern in stale:
                for path in folder.glob(pattern):
                    path.unlink()
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(folder / path.name)
        else:
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
