"""Explain an answer: shades for the Δ of each token of the context, marks where the answer is."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import regex
from wcwidth import wcswidth

from common.errors import printable
from common.text import UNSPACED, fold
from mamba_lm.tokenizer import encode_with_offsets
from squad_utils import abstains

if TYPE_CHECKING:  # torch is imported late: the terminal waits for this module
    from torch import Tensor

LEVELS = 5
BLOCKS, ASCII = " ░▒▓█", " .:+#"  # from the lowest level on
# Backgrounds in the same order, with dark text: legible on light and dark terminals.
COLORS = ("", *(f"black on #{rgb}" for rgb in ("ffe9b8", "ffcf70", "ffab40", "f57c1f")))
MARK = "bold underline"
OPEN, CLOSE = "[", "]"
_CHARACTER = regex.compile(r"\X")  # a grapheme: a letter with its accents is one


class _Cell(NamedTuple):
    """A character as printed, and its shade, once for each column that it takes."""

    text: str
    shades: str


class Explanation(NamedTuple):
    """A context, the strength of each token (the norm of Δ), and where the answer is."""

    context: str
    tokens: list[tuple[int, int, float]]  # start, end, strength
    spans: list[tuple[int, int]]  # start, end; empty if the answer is not in it

    def bounds(self) -> tuple[float, float]:
        """The strengths of the lowest and the highest shade: quantiles 2 % and 98 %, so that a few
        outliers do not take all shades."""
        strengths = sorted(strength for *_, strength in self.tokens)
        outliers = len(strengths) // 50
        return strengths[outliers], strengths[-1 - outliers]

    def levels(self) -> list[int]:
        """The level of each character, 0 to LEVELS - 1, in equal steps of strength."""
        low, high = self.bounds()
        levels = [0] * len(self.context)
        for start, end, strength in self.tokens:
            share = (strength - low) / (high - low) if high > low else 0.0
            share = share if math.isfinite(share) else 0.0
            level = min(max(int(LEVELS * share), 0), LEVELS - 1)
            for place in range(start, end):  # two tokens may share a character
                if not self.context[place].isspace():
                    levels[place] = max(levels[place], level)
        return levels

    def legend(self) -> str:
        low, high = self.bounds()
        count = len(self.spans)
        answer = {0: "is not in the context", 1: "is marked"}.get(count, f"is marked {count} times")
        return f"shade: Δ from {low:.2f} to {high:.2f}; the answer {answer}"

    def plain_lines(self, width: int, shades: str = BLOCKS) -> Iterator[str]:
        """Yield the context in lines of at most `width` columns, the answer in brackets, and below
        each line its shades."""
        levels = self.levels()
        opening = {start for start, _ in self.spans}
        closing = {end for _, end in self.spans}
        cells: list[_Cell] = []
        for match in _CHARACTER.finditer(self.context):
            start, end = match.span()
            cells += [_Cell(CLOSE, " ")] * (start in closing) + [_Cell(OPEN, " ")] * (
                start in opening
            )
            text = to_printable(match[0])
            shade = shades[max(levels[start:end])]
            cells.append(_Cell(text, shade * max(wcswidth(text), 0)))
        cells += [_Cell(CLOSE, " ")] * (len(self.context) in closing)
        for line in _wrap(cells, width):
            for row in zip(*line, strict=True):
                yield "".join(row).rstrip()

    def styles(self) -> Iterator[tuple[str, int, int]]:
        """Yield (style, start, end) for `rich`: backgrounds, then marks."""
        start = 0
        for level, run in itertools.groupby(self.levels()):
            end = start + len(list(run))
            yield COLORS[level], start, end
            start = end
        yield from ((MARK, *span) for span in self.spans)


def token_strengths(tokenizer, context: str, norms: "Tensor") -> list[tuple[int, int, float]]:
    """Each token's start and end in the context, and its mean of norms (layers, tokens)."""
    [(_, places)] = encode_with_offsets(tokenizer, [context])
    return [(*place, s) for place, s in zip(places, norms.mean(dim=0).tolist(), strict=True)]


def find_answer(context: str, answer: str) -> list[tuple[int, int]]:
    """The spans (start, end) of the answer in the context: of whole words in scripts with spaces,
    in any Unicode form (`common.text.fold`) and with any spaces; none if it is NO_ANSWER or folds
    to nothing. Spans contain whole characters, with their accents."""
    words = fold(answer).split()
    if abstains(answer) or not words:
        return []
    pattern = r"\s+".join(map(re.escape, words))
    if not UNSPACED.search(answer):
        pattern = rf"(?<!\w){pattern}(?!\w)"
    characters = [match.span() for match in _CHARACTER.finditer(context)]
    parts = [fold(context[start:end]) for start, end in characters]
    ends = list(itertools.accumulate(map(len, parts)))
    first = {
        end - len(part): place
        for place, (part, end) in enumerate(zip(parts, ends, strict=True))
        if part
    }
    last = {end: place for place, (part, end) in enumerate(zip(parts, ends, strict=True)) if part}
    return [
        (characters[first[match.start()]][0], characters[last[match.end()]][1])
        for match in re.finditer(pattern, "".join(parts))
        if match.start() in first and match.end() in last  # else within a character
    ]


def to_printable(text: str) -> str:
    """Text of several lines without control characters, safe to print on a terminal."""
    return printable(text.replace("\r\n", "\n").replace("\t", " "), keep="\n")


def _wrap(cells: list[_Cell], width: int) -> Iterator[list[_Cell]]:
    """Yield lines of whole words; a word that is wider than a line is broken."""
    line: list[_Cell] = []
    columns = after_space = 0  # width of the line; the cell after its last space
    for cell in cells:
        if cell.text == "\n":
            yield line
            line, columns, after_space = [], 0, 0
            continue
        if line and columns + len(cell.shades) > width and cell.text != " ":
            end = after_space or len(line)
            yield line[:end]
            line = line[end:]
            columns, after_space = sum(len(c.shades) for c in line), 0
        line.append(cell)
        columns += len(cell.shades)
        if cell.text == " ":
            after_space = len(line)
    yield line
