"""What each field of a config file means here; a field that is in no table is refused by name.

A format's table names every field that its own software knows. docs/config_fields.md prints them.
"""

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError


class Role(StrEnum):
    USED = "used"  # it decides what the model computes
    INITIAL = "random weights only"  # it decides how weights start, nothing about weights in files
    DESCRIBES = "describes only"  # it changes no result here; any value is accepted
    REFUSED = "refused"  # any value but null is refused


class Field(NamedTuple):
    """A field's role, the values that are accepted, in words and as a test, and a remark."""

    role: Role
    accepted: str = "any value"
    accepts: Callable[[object], bool] = lambda value: True
    remark: str = ""


Table = Mapping[str, Field]


def used(accepted: str, accepts: Callable[[object], bool], remark: str = "") -> Field:
    return Field(Role.USED, accepted, accepts, remark)


def only(*values: object, role: Role = Role.USED, remark: str = "") -> Field:
    """A field for which only these values are supported."""
    words = " or ".join(map(_as_json, values))
    return Field(role, words, lambda value: any(_is_same(value, one) for one in values), remark)


def refused(remark: str) -> Field:
    return Field(Role.REFUSED, "null", lambda value: value is None, remark)


def describes(*names: str, remark: str = "") -> dict[str, Field]:
    return dict.fromkeys(names, Field(Role.DESCRIBES, remark=remark))


def is_size(value: object) -> bool:
    return type(value) is int and value >= 1


def is_bool(value: object) -> bool:
    return type(value) is bool


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def is_not_negative(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def is_rank(value: object) -> bool:
    return value == "auto" or is_size(value)


SIZE = used("an integer of 1 or more", is_size)
BOOL = used("true or false", is_bool)
RANK = used('"auto" or an integer of 1 or more', is_rank)
EPSILON = used("a number of 0 or more", is_not_negative)
DEVIATION = used("a number of 0 or more", is_not_negative, "of a random embedding")


def check_fields(raw: Mapping, table: Table, path: Path, is_random: bool, place: str = "") -> None:
    """UserError, with the field's name, unless the table has all fields of a config and accepts
    their values. Fields about how weights start do not matter where weights come from files.

    place: where in the file the fields are, such as "ssm_cfg."
    """
    for name, value in raw.items():
        field = table.get(name)
        if field is None:
            raise UserError(
                f"{path}: the field {place}{name} ({_as_json(value)}) is not understood; it may "
                "change what the model computes. Remove it if it does not"
            )
        if field.role is Role.INITIAL and not is_random:
            continue
        if not field.accepts(value):
            remark = f" ({field.remark})" if field.remark else ""
            raise UserError(
                f"{path}: {place}{name} is {_as_json(value)}; supported: {field.accepted}{remark}"
            )


def require(raw: Mapping, names: tuple[str, ...], path: Path) -> None:
    """UserError where a config lacks one of these fields."""
    for name in names:
        if name not in raw:
            raise UserError(f"{path}: the field {name} is missing")


def _is_same(value: object, other: object) -> bool:
    """Whether two values are equal, where true is not 1."""
    return (type(value) is type(other) and value == other) or (
        {type(value), type(other)} == {int, float} and value == other
    )


def _as_json(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    return text if len(text) <= 60 else f"{text[:60]}..."
