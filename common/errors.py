"""What the user can mend, told in one line: raised anywhere, printed by `script.run_script`."""

import argparse
import math
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


def say_loading(what: str) -> None:
    """A line for who waits at a terminal, from the first of several processes."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"loading {printable(what)} ...", file=sys.stderr, flush=True)


def write_utf_8() -> None:
    """Make standard output UTF-8 whatever the locale says, as who reads JSON or CSV expects."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """A script's arguments, described by its docstring; a wrong one is a UserError."""

    def __init__(self, description: str, **kwargs):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=kind, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        found, others = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            # As an unset variable of a shell gives it; it would be no file, or the folder here.
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"argument {name}: is empty; give a value, or leave it out")
        return found, others

    def error(self, message: str):
        raise UserError(f"{message} (--help lists all arguments)")


MOST = 2**31 - 1  # of whole numbers that others count with


def positive_int(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    return _whole_number(text, 1, MOST)


def token_count(text: str) -> int:
    """An argparse type: how many tokens may be made, for which there is to be memory."""
    return _whole_number(text, 1, 1_000_000)


def seed(text: str) -> int:
    """An argparse type: a whole number that every random generator takes."""
    return _whole_number(text, 0, 2**32 - 1)


def _whole_number(text: str, least: int, most: int) -> int:
    # Python refuses to read numbers of thousands of digits.
    if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40}: give a whole number from {least} to {most}"
        )
    return int(text)


def positive_float(text: str) -> float:
    """An argparse type: a number above 0, and not so large that a count made of it overflows."""
    value = _number(text)
    if not 0 < value <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give a number above 0, at most {MOST}")
    return value


def temperature(text: str) -> float:
    """An argparse type: 0, or a number by which logits can be divided."""
    value = _number(text)
    if value != 0 and not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give 0, or a number from 1e-6 to 1e6")
    return value


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give a number from 0 to 1")
    return value


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
