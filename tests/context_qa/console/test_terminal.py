"""Output on a terminal of any size, with and without colours."""

import io
import re
import sys

import pytest

from context_qa.console.explanation import Explanation
from context_qa.console.terminal import Screen

TEXT = "Bo is 日本 👩\u200d👧 a\u0301 cat"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", ["0", "1", "2", "5", "80", "-3", "x", ""])
@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "xterm-256color"},
        {"TERM": "dumb"},
        {"TERM": "xterm", "NO_COLOR": "1"},
        {"TERM": ""},
    ],
    ids=["colours", "dumb", "no colours", "unknown"],
)
def test_a_whole_answer_is_printed(monkeypatch, columns, environment):
    for name, value in (environment | {"COLUMNS": columns}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    screen = Screen()
    screen.print_answer("A: ")
    screen.print_answer("Marco\nQuill", "dim")
    printed = re.sub("\x1b\\[[0-9;]*m", "", sys.stdout.getvalue())
    assert printed == "A: Marco\nQuill"
    screen.print_explanation(Explanation(TEXT, [(0, 2, 1.0), (3, 5, 3.0)], [(6, 8)]))
    printed = re.sub("\x1b\\[[0-9;]*m|[\\[\\]█\\s]", "", sys.stdout.getvalue())
    assert re.sub(r"\s", "", TEXT) in printed and printed.endswith("theanswerismarked)")
