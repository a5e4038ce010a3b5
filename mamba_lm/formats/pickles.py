"""What a pickle of weights, or of a run's state, may contain, checked before torch reads it.

`torch.load(weights_only=True)` runs no code of a pickle's maker, but it calls functions that take
any memory (bytearray(10**12)), and hashes tuples of tuples that a few hundred bytes nest until it
never ends. A state dict needs neither: it has strings, tensors made of storages, and mappings.
"""

import pickletools
import re
import zipfile
from pathlib import Path

from common.errors import UserError
from mamba_lm.foreign_files import parsing

_FUNCTIONS = re.compile(
    "collections OrderedDict|torch Size|torch.serialization _get_layout|torch [a-z0-9_]+|"
    "torch._utils _rebuild_(tensor(_v2|_v3)?|parameter|sparse_tensor|meta_tensor_no_storage)"
)
_ARRAYS = re.compile(  # of NumPy, in the state of random numbers
    r"_codecs encode|numpy (dtype|ndarray)|numpy\._?core\.multiarray _reconstruct"
)
_STORAGES = re.compile(r"torch [A-Za-z0-9]+Storage|torch\.storage UntypedStorage")
_KINDS = {"BINUNICODE": "text", "SHORT_BINSTRING": "text", "REDUCE": "made", "BINPERSID": "made"}


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
