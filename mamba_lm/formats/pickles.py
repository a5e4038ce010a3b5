"""What a pickle of weights may contain, checked before torch reads it.

`torch.load(weights_only=True)` runs no code of a pickle's maker, but it calls functions that take
any memory (bytearray(10**12)), and hashes tuples of tuples that a few hundred bytes nest until it
never ends. A state dict needs neither: it has strings, tensors made of storages, and mappings.
"""

import pickletools
import re

_FUNCTIONS = re.compile(
    "collections OrderedDict|torch Size|torch.serialization _get_layout|torch [a-z0-9_]+|"
    "torch._utils _rebuild_(tensor(_v2|_v3)?|parameter|sparse_tensor|meta_tensor_no_storage)"
)
_STORAGES = re.compile(r"torch [A-Za-z0-9]+Storage|torch\.storage UntypedStorage")
_KINDS = {"BINUNICODE": "text", "SHORT_BINSTRING": "text", "REDUCE": "made", "BINPERSID": "made"}


def oddity(pickled: bytes) -> str | None:
    """What a pickle has that a state dict has not, in words; None if there is nothing. Raises what
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
            if kind == "function" and not _FUNCTIONS.fullmatch(argument):
                return argument
        else:
            kind = _KINDS.get(opcode.name, "")
        if last == "storage" and kind != "text":  # its key in the file
            return "a storage that is not in the file"
        last = kind
    return None
