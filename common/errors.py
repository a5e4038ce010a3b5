"""Errors and warnings for the user: one printable line on standard error."""

import os
import re
import sys


class UserError(Exception):
    """Bad input, a missing file, an unusable setting: what the user can fix.

    The message says what is wrong, where (file, line) and what to do. `script.run_script` prints it
    as one line and exits with code 2.
    """


# Characters that move a terminal's cursor, change its colours, break a line or reverse the
# direction of text; and surrogates, which no encoding can write.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Escape control characters, as Python writes them, so that text is safe for a terminal.

    Args:
        text: text from a file or from the user.
        keep: control characters that stay as they are, such as "\n".
    """
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def warn(text: str) -> None:
    """Print a one-line warning on standard error: something works, but not as expected."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def report_loading(what: str) -> None:
    """Report on a terminal that something is being loaded; on rank 0 only."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"loading {printable(what)} ...", file=sys.stderr, flush=True)
