"""Standard streams of a script: closed, full, or in an encoding that lacks characters."""

import io
import os
import sys


def prepare_streams() -> None:
    """Open closed streams on /dev/null, escape characters that an encoding lacks, and ignore errors
    when standard error is written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the program that ran the script
            null = os.open(os.devnull, os.O_RDWR)  # gets the number of the closed descriptor
            setattr(sys, name, os.fdopen(null, mode, closefd=False))
    if sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    raw = io.BufferedWriter(_ForgivingFile(sys.stderr.fileno(), "w", closefd=False))
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)


class _ForgivingFile(io.FileIO):
    """Standard error may be full or closed: a message that cannot be written stops no work."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def discard_stdout() -> None:
    """Send standard output to /dev/null, so that Python's flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_utf_8() -> None:
    """Make standard output UTF-8 in any locale, as readers of JSON and CSV expect."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
