"""What a model let in of a context, and where its answer stands there: shades and marks."""

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

if TYPE_CHECKING:  # all that waits for a line on a terminal is to be imported fast
    from torch import Tensor

LEVELS = 5
BLOCKS, ASCII = " ░▒▓█", " .:+#"  # from the weakest level on
# Backgrounds of the same order, each with dark text on it: legible on light and dark terminals.
COLORS = ("", *(f"black on #{rgb}" for rgb in ("ffe9b8", "ffcf70", "ffab40", "f57c1f")))
MARK = "bold underline"
OPEN, CLOSE = "[", "]"
_CHARACTER = regex.compile(r"\X")  # as people count them: a letter with its accents is one


class _Cell(NamedTuple):
    """A character as it is shown and, below it, as many shades as it is columns wide."""

    text: str
    shades: str


class Explanation(NamedTuple):
    """Of a context each token's place and strength, the norm of Δ, and the places of the answer."""

    context: str
    tokens: list[tuple[int, int, float]]  # start, end, strength
    spans: list[tuple[int, int]]  # start, end; none where the model abstained or put it otherwise

    def bounds(self) -> tuple[float, float]:
        """Between what strengths shades lie: the weakest and the strongest, but for one token in
        fifty at either end, which would leave no shades to the others."""
        strengths = sorted(strength for *_, strength in self.tokens)
        spare = len(strengths) // 50
        return strengths[spare], strengths[-1 - spare]

    def levels(self) -> list[int]:
        """The level of each character's shade, 0 to LEVELS - 1, in even steps of strength."""
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
        places = len(self.spans)
        answer = {0: "stands nowhere in it", 1: "is marked"}.get(
            places, f"is marked, {places} times"
        )
        return f"shade: Δ from {low:.2f} to {high:.2f}; the answer {answer}"

    def plain_lines(self, width: int, shades: str = BLOCKS) -> Iterator[str]:
        """The context in lines of at most `width` columns, each with its shades below it, and the
        answer in brackets."""
        levels = self.levels()
        opening = {start for start, _ in self.spans}
        closing = {end for _, end in self.spans}
        cells: list[_Cell] = []
        for match in _CHARACTER.finditer(self.context):
            start, end = match.span()
            cells += [_Cell(CLOSE, " ")] * (start in closing) + [_Cell(OPEN, " ")] * (
                start in opening
            )
            text = shown(match[0])
            shade = shades[max(levels[start:end])]
            cells.append(_Cell(text, shade * max(wcswidth(text), 0)))
        cells += [_Cell(CLOSE, " ")] * (len(self.context) in closing)
        for line in _wrapped(cells, width):
            for row in zip(*line, strict=True):
                yield "".join(row).rstrip()

    def styles(self) -> Iterator[tuple[str, int, int]]:
        """(style, start, end) for `rich`: backgrounds, then marks."""
        start = 0
        for level, run in itertools.groupby(self.levels()):
            end = start + len(list(run))
            yield COLORS[level], start, end
            start = end
        yield from ((MARK, *span) for span in self.spans)


def token_strengths(tokenizer, context: str, norms: "Tensor") -> list[tuple[int, int, float]]:
    """Each token's place in the context and its mean over layers of norms (layers, tokens)."""
    [(_, places)] = encode_with_offsets(tokenizer, [context])
    return [(*place, s) for place, s in zip(places, norms.mean(dim=0).tolist(), strict=True)]


def answer_spans(context: str, answer: str) -> list[tuple[int, int]]:
    """Where the answer is in the context, as words of its own where these are written apart,
    whatever the blanks and in whatever form the characters are (`common.text.fold`); nowhere if it
    is NO_ANSWER or folds to nothing. Spans are of whole characters, their marks included."""
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


def shown(text: str) -> str:
    """Foreign text of several lines as a terminal may get it."""
    return printable(text.replace("\r\n", "\n").replace("\t", " "), keep="\n")


def _wrapped(cells: list[_Cell], width: int) -> Iterator[list[_Cell]]:
    """Lines of whole words; words alone that are wider than a line are broken."""
    line: list[_Cell] = []
    columns = blank = 0  # taken by the line; and where, after its last blank, it can be broken
    for cell in cells:
        if cell.text == "\n":
            yield line
            line, columns, blank = [], 0, 0
            continue
        if line and columns + len(cell.shades) > width and cell.text != " ":
            end = blank or len(line)
            yield line[:end]
            line = line[end:]
            columns, blank = sum(len(c.shades) for c in line), 0
        line.append(cell)
        columns += len(cell.shades)
        if cell.text == " ":
            blank = len(line)
    yield line
