"""What the user can mend, told in one line: raised anywhere, printed once, exit code 2."""

import argparse
import errno
import math
import os
import re
import signal
import sys


class UserError(Exception):
    """Bad input, a missing file, an unusable setting. The message names the thing and the mend."""


class _Terminated(BaseException):
    """SIGTERM has come: as a Ctrl-C, it ends the script by way of every `finally`."""


def run_script(main, parse_args) -> None:
    """Run a script's `main(parse_args())`: exit 2 with one line on a UserError, a path that the
    system refuses or an output that takes no more, 130 on Ctrl-C, 143 on SIGTERM."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who ran the script
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))

    def terminate(signal_number, frame):
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        main(parse_args())
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_report(f"error: {error}", code=2))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted", code=130))
    except _Terminated:
        sys.exit(_report("terminated", code=143))
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        _throw_output_away()
        sys.exit(141)
    except OSError as error:  # a path that cannot even be looked at: too long, not permitted
        if error.filename is not None:
            sys.exit(_report(f"error: {error.filename}: {error.strerror}", code=2))
        if error.errno not in _FULL_OR_GONE:
            raise
        _throw_output_away()
        sys.exit(_report(f"error: standard output or input: {error.strerror}", code=2))


_FULL_OR_GONE = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)


def _throw_output_away() -> None:
    """What is still to be written, which Python would try at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# What moves a terminal's cursor, colours or erases it, breaks a line or turns its direction round,
# and halves of surrogate pairs, which no encoding has.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Foreign text as it may reach a terminal: on one line, its control characters as Python writes
    them; those in `keep`, such as "\n", stay as they are."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def warn(text: str) -> None:
    """A line on standard error about what works, but not as one might think."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of 1 or more")
    return int(text)


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return value


def not_negative(text: str) -> float:
    """An argparse type: a finite number of 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of 0 or more")
    return value


def seed(text: str) -> int:
    """An argparse type: a whole number that every random generator takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 to 1")
    return value


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _report(line: str, code: int) -> int:
    print(printable(line), file=sys.stderr)
    return code
