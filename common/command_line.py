"""The parser of the scripts' command lines, and argparse types that check ranges."""

import argparse
import math

from common.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError instead of printing the usage and exiting.

    The description is the script's docstring, printed as it is written.
    """

    def __init__(self, description: str, **kwargs):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=kind, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        found, others = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            # From an unset shell variable; as a path it would mean the current folder.
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"argument {name}: is empty; give a value or remove the argument")
        return found, others

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the arguments)")


MAX_INT = 2**31 - 1  # libraries count with 32-bit integers


def positive_int(text: str) -> int:
    """An argparse type: an integer from 1 to `MAX_INT`."""
    return _integer(text, 1, MAX_INT)


def token_count(text: str) -> int:
    """An argparse type: a number of tokens to generate, from 1 to 1,000,000."""
    return _integer(text, 1, 1_000_000)


def seed(text: str) -> int:
    """An argparse type: a seed that every random generator accepts, from 0 to 2**32 - 1."""
    return _integer(text, 0, 2**32 - 1)


def _integer(text: str, minimum: int, maximum: int) -> int:
    # Python refuses to parse numbers of thousands of digits.
    if not text.isdecimal() or len(text) > 20 or not minimum <= int(text) <= maximum:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40}: give an integer from {minimum} to {maximum}"
        )
    return int(text)


def positive_float(text: str) -> float:
    """An argparse type: a number above 0 and at most `MAX_INT`; larger products may overflow."""
    value = _number(text)
    if not 0 < value <= MAX_INT:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40}: give a number above 0 and at most {MAX_INT}"
        )
    return value


def temperature(text: str) -> float:
    """An argparse type: 0 for greedy decoding, or a number that logits can be divided by."""
    value = _number(text)
    if value != 0 and not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give 0 or a number from 1e-6 to 1e6")
    return value


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give a number from 0 to 1")
    return value


def _number(text: str) -> float:
    """Parse a number; NaN if the text is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan
