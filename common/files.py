"""Files that are read with one complaint, and files and folders that are written whole or not."""

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import UserError

MODEL_FILES = (  # a model's configuration and weights, in one file or in several
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def read_text(path: str | Path, wanted: str) -> str:
    """A file's text; UserError as `read_bytes`, and where it is not UTF-8, naming the line."""
    data = read_bytes(path, wanted)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise UserError(f"{path}: is no text but binary data; give {wanted}") from error
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8; convert the file to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: str | Path, wanted: str) -> bytes:
    """The bytes of a file that is to hold text; UserError where it cannot be read, naming what is
    `wanted`, or where its first bytes are those of another format, naming that."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give {wanted}") from error
    except ValueError as error:
        raise UserError(f"{path!r}: no path ({error}); give {wanted}") from error
    for signature, found in _SIGNATURES.items():
        if data.startswith(signature):
            raise UserError(f"{path}: {found}")
    return data


_COMPRESSED = "is compressed with {}; decompress it"
_SIGNATURES = {  # the first bytes of what is given by mistake where text is wanted
    b"\x1f\x8b": _COMPRESSED.format("gzip"),
    b"\xfd7zXZ\0": _COMPRESSED.format("xz"),
    b"BZh": _COMPRESSED.format("bzip2"),
    b"\x28\xb5\x2f\xfd": _COMPRESSED.format("Zstandard"),
    b"7z\xbc\xaf\x27\x1c": "is a 7-Zip archive; extract the file that is in it",
    b"PK\3\4": "is a ZIP archive or an office document (docx, xlsx); give the text that is in it",
    b"PAR1": "is a Parquet file; convert it to JSONL",
    b"SQLite format 3\0": "is an SQLite database; export the table as JSONL",
    b"%PDF-": "is a PDF document; give its text",
    b"\xff\xfe": "is UTF-16 text; convert the file to UTF-8",
    b"\xfe\xff": "is UTF-16 text; convert the file to UTF-8",
}


class Kind(NamedTuple):
    """A kind of file that is written here, and what tells by a file's content, from its first byte
    on, that it is one."""

    name: str
    is_ours: Callable[[BinaryIO], bool]


def keep_inputs(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path | None], are_folders: bool = False
) -> None:
    """Raise a UserError if writing an output would destroy an input of the same command, whatever
    its name is (a link, a hard link), or another one of the outputs. In an output folder no input
    may be."""
    outputs = list(map(str, outputs))
    read = [str(path) for path in inputs if path and os.path.exists(path)]  # others: Hub names
    for output, path in itertools.product(outputs, read):
        if _is_same(output, path) or (are_folders and _is_below(path, output)):
            where = "" if path == output else f" where {output} is written"
            raise UserError(f"{path}: is read too and would be lost{where}; give another output")
    for one, other in itertools.combinations(outputs, 2):
        if _is_same(one, other):
            raise UserError(f"{one}: is the same file as {other}; both would be written")


def _is_same(one: str, other: str) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_output(path: str | Path, kind: Kind | None, overwrite: bool = False) -> None:
    """Raise a UserError unless nothing is lost where a file of this kind is written: there is no
    file yet, or an empty one, or one of the kind and `overwrite` is true. None: a kind that nothing
    tells from a user's own files, and that is never replaced."""
    _check_is_file(path)
    if not os.path.exists(path):
        return
    with named_errors(path), open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return
        is_ours = kind is not None and kind.is_ours(stream)
    if kind is None:
        raise UserError(f"{path}: exists and is not replaced; remove it or give another path")
    if not is_ours:
        complaint = f"contains something else than {kind.name} and is not replaced"
        raise UserError(f"{path}: {complaint}; move it away or give another path")
    if not overwrite:
        raise UserError(f"{path}: contains {kind.name}; give another path or set overwrite")


def write_output(
    output: str | Path, text: str, kind: Kind | None = None, overwrite: bool = False
) -> None:
    """Write as `write_whole` what `check_output` allows. A file that has this text stays."""
    _check_is_file(output)
    if not _holds(output, text):
        check_output(output, kind, overwrite)
        write_whole(output, text, lambda: check_output(output, kind, overwrite))


def _holds(path: str | Path, text: str) -> bool:
    data = _encoded(text)
    if not os.path.exists(path) or os.path.getsize(path) != len(data):
        return False
    with named_errors(path):
        return Path(path).read_bytes() == data


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """An OSError as a UserError that names the file."""
    try:
        yield
    except OSError as error:
        complaint = f"{path}: cannot be written ({error.strerror}); mend that or give another path"
        raise UserError(complaint) from error


def write_whole(output: str | Path, text: str, check: Callable[[], None] = lambda: None) -> None:
    """Write a text file in UTF-8, with its parent folders, in one step: what was there before stays
    if anything goes wrong, or if `check`, just before that step, raises an error. UserError where
    it cannot be written."""
    _check_is_file(output)
    with named_errors(output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        os.close(replaced(output, text, check))


def new_folder(output: str | Path) -> Path:
    """An output folder with nothing in it, made now: work must not end in a path that cannot be
    written. UserError where it holds anything."""
    folder = Path(output)
    with named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        first = min((path.name for path in folder.iterdir()), default=None)
    if first is not None:
        raise UserError(f"{folder}: contains other files ({first}); give another folder")
    require_writable(folder)
    return folder


def require_writable(output: str | Path) -> None:
    """UserError unless files can be made in this folder, or in the one that will hold it."""
    with named_errors(output):
        place = Path(output).absolute()
        place = place if place.is_dir() else place.parent
        while not place.exists():
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()


def _check_is_file(output: str | Path) -> None:
    if os.path.exists(output) and not os.path.isfile(output):  # a folder, a pipe, a device
        raise UserError(f"{output}: cannot be written (not a file); give another path")


def _encoded(text: str) -> bytes:
    """A name on a command line can hold what UTF-8 cannot."""
    return text.encode(errors="replace")


def replaced(output: str | Path, text: str, check: Callable[[], None] = lambda: None) -> int:
    """Write as `write_whole`, in a folder that is there; the new file's descriptor, on which the
    lock is that `locked` takes. Raises OSError."""
    path = Path(os.path.realpath(output))  # a link stays one
    partial, descriptor = _new_partial(path)
    try:
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode)
        locked(descriptor)
        write_at(descriptor, _encoded(text), 0)
        check()
        os.replace(partial, path)
    except BaseException:
        os.close(descriptor)
        partial.unlink(missing_ok=True)
        raise
    return descriptor


def _new_partial(path: Path) -> tuple[Path, int]:
    """A new file beside a path, and its descriptor."""
    for number in itertools.count(os.getpid()):
        partial = path.with_name(f"{path.name}.{number}.partial")
        with contextlib.suppress(FileExistsError):
            return partial, os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


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
    with named_errors(folder):
        partial.mkdir(parents=True)
    try:
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
