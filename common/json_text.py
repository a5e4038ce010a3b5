"""Read JSON from untrusted files, and write JSON that every parser and terminal accepts."""

import json
import math
import re
from pathlib import Path

from common.errors import CONTROLS, UserError
from common.input_files import read_text

MAX_NESTING = 64  # levels of JSON; code that walks deeper values may run out of stack


def read_json(path: str | Path, wanted: str = "a JSON file") -> object:
    """Read the JSON value in an untrusted file.

    Args:
        path: the file.
        wanted: what the file should be, for the error message.

    Raises:
        UserError: if the file cannot be read, or as `parse_json`.
    """
    return parse_json(read_text(path, wanted), str(path))


def parse_json(text: str | bytes, place: str) -> object:
    """Parse a JSON value.

    Args:
        text: the JSON.
        place: where it comes from, for the error message: a file, and the line if it is JSONL.

    Raises:
        UserError: if the text is not JSON, is nested more than `MAX_NESTING` levels deep, or
            contains a number of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{place}: is nested too deep") from error
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if is_nested_too_deep(value):
        raise UserError(f"{place}: is nested more than {MAX_NESTING} levels deep")
    return value


def is_nested_too_deep(value: object) -> bool:
    """Whether a JSON value has more than `MAX_NESTING` levels of lists and objects."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def json_text(value: object, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Write a value as JSON. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(value: object) -> str:
    """Write a value as JSON on one line, safe for a terminal: NaN and infinities become null,
    control characters are escaped."""
    return plain_json(json_text(value, ensure_ascii=False))


def plain_json(text: str) -> str:
    """Convert JSON as Python or DuckDB writes it to the form of `json_line`."""
    text = _JSON_WORD.sub(lambda found: _PLAIN_WORDS.get(found[0][-1], found[0]), text)
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_JSON_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|-?(?:NaN|Infinity)|[\t\n\r]')


_PLAIN_WORDS = {"N": "null", "y": "null", "\t": " ", "\n": " ", "\r": " "}  # by last letter
