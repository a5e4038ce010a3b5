"""Read untrusted files, such as those of a model's folder.

Only regular files are read, because reading a pipe or a device may never end. JSON is limited in
size and depth before a library reads it. Any error that a library raises while it parses becomes a
UserError that names the file; `parsing` blocks contain the library's call alone, so that our own
bugs still give a traceback.

A pickle, of weights or of a run's state, is checked before torch reads it.
`torch.load(weights_only=True)` runs no code of a pickle's maker, but it calls functions that take
any memory (bytearray(10**12)), and hashes tuples of tuples that a few hundred bytes nest until it
never ends. A state dict needs neither: it has strings, tensors made of storages, and mappings.
"""

import contextlib
import os
import pickletools
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError
from common.json_text import read_json

MAX_JSON_BYTES = 48 * 2**20  # the largest public tokenizers have 33 MB, parsed 25 times that

# What a pickle may contain.
_FUNCTIONS = re.compile(
    "collections OrderedDict|torch Size|torch.serialization _get_layout|torch [a-z0-9_]+|"
    "torch._utils _rebuild_(tensor(_v2|_v3)?|parameter|sparse_tensor|meta_tensor_no_storage)"
)
_ARRAYS = re.compile(  # of NumPy, in the state of random numbers
    r"_codecs encode|numpy (dtype|ndarray)|numpy\._?core\.multiarray _reconstruct"
)
_STORAGES = re.compile(r"torch [A-Za-z0-9]+Storage|torch\.storage UntypedStorage")
_KINDS = {"BINUNICODE": "text", "SHORT_BINSTRING": "text", "REDUCE": "made", "BINPERSID": "made"}


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


def require_plain(path: Path, kind: str, has_arrays: bool = False) -> None:
    """UserError unless a file is one that `torch.save` of version 1.6 or later has written of
    tensors and plain values, and NumPy's arrays where it has these: others can take any memory, or
    any time, when they are read. kind: of file, for the message."""
    refusal = f"{path}: truncated or not a {kind} file of torch 1.6 or later"
    with parsing(lambda reason: f"{refusal} ({reason})"), zipfile.ZipFile(path) as archive:
        is_compressed = any(entry.compress_type for entry in archive.infolist())
        names = archive.namelist() if not is_compressed else ()
        pickles = [archive.read(name) for name in names if name.lower().endswith("data.pkl")]
        odd = [found for pickled in pickles if (found := oddity(pickled, has_arrays))]
    if is_compressed:
        raise UserError(f"{path}: a compressed {kind} file; save it again with torch.save")
    if odd:
        raise UserError(
            f"{path}: contains {odd[0]:.60}, which no {kind} file needs; save a state dict"
        )


def oddity(pickled: bytes, has_arrays: bool = False) -> str | None:
    """What a pickle contains that no state dict does, in words; None if nothing. Raises what
    `pickletools.genops` does."""
    memo: dict[int, str] = {}
    last = ""  # of what is on top of the stack: text, made, function, storage, or nothing of these
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        if opcode.name in ("BINGET", "LONG_BINGET"):
            kind = memo.get(argument, "")
            if not kind:
                return "a value twice that is no tensor"
        elif opcode.name == "GLOBAL":
            kind = "storage" if _STORAGES.fullmatch(argument) else "function"
            is_array = has_arrays and _ARRAYS.fullmatch(argument)
            if kind == "function" and not (is_array or _FUNCTIONS.fullmatch(argument)):
                return argument
        else:
            kind = _KINDS.get(opcode.name, "")
        if last == "storage" and kind != "text":  # its key in the file
            return "a storage that is not in the file"
        last = kind
    return None
