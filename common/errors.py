"""What the user can mend, told in one line: raised anywhere, printed by `script.run_script`."""

import os
import re
import sys


class UserError(Exception):
    """Bad input, a missing file, an unusable setting. The message names the thing and the mend."""


# What moves a terminal's cursor, colours or erases it, breaks a line or turns its direction round,
# and halves of surrogate pairs, which no encoding has.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Foreign text as it may reach a terminal: on one line, its control characters as Python writes
    them; those in `keep`, such as "\n", stay as they are."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def warn(text: str) -> None:
    """A line on standard error about what works, but not as one might think."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def report_loading(what: str) -> None:
    """A line for who waits at a terminal, from the first of several processes."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"loading {printable(what)} ...", file=sys.stderr, flush=True)


def write_utf_8() -> None:
    """Make standard output UTF-8 whatever the locale says, as who reads JSON or CSV expects."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
