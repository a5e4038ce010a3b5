"""Parsers of command lines and the types of their arguments."""

import argparse
import math

from common.errors import UserError


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
