"""Make reading practice out of plain text, without labels: recurring span selection.

    python -m data.make_recall wiki.train.txt results/recall.jsonl

A name or a number that recurs in a passage is masked in one place, and asked for: the question is
the sentence with the blank, the answer occurs elsewhere in the passage (Ram et al. 2021, "Few-Shot
Question Answering by Pretraining Span Selection"). Up to five such spans of a passage are masked,
each in a sentence of its own, so that all of its questions share one context. TEXT holds a
paragraph a line, as WikiText does, whose marks (` @-@ `, blanks before commas) are taken out.
"""

from common.script import run_script

import argparse
import random
import re

from common.command_line import Parser, seed
from common.errors import UserError, printable
from common.input_files import read_text
from common.output_files import check_inputs_not_overwritten
from squad_utils import Example, write_examples

BLANK = "___"
QUESTIONS = 5  # of a passage, at most
WORDS = range(40, 251)  # of a passage
SPAN_WORDS = 4  # at most
QUESTION_WORDS = 30  # at most, around the blank
_NAME_OR_NUMBER = re.compile(
    r"(?<!\w)(?:[A-Z](?:[\w-]|'[A-Z])+(?: [A-Z](?:[\w-]|'[A-Z])+)*|\d[\d,.]*\d|\d)(?!\w)"
)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("text", metavar="TEXT", help="UTF-8 text, a paragraph a line")
    parser.add_argument("output", metavar="OUTPUT", help="JSONL file to write")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], [args.text])
    text = read_text(args.text, "a text in UTF-8")
    rng = random.Random(args.seed)
    examples = [
        example for line in text.split("\n") for example in questions(without_marks(line), rng)
    ]
    if not examples:
        raise UserError(f"{args.text}: no paragraph of {WORDS[0]} to {WORDS[-1]} words repeats a "
                        "name or a number")  # fmt: skip
    write_examples(examples, args.output)
    num_contexts = len({example.context for example in examples})
    print(f"{printable(args.output)}: {len(examples):,} questions on {num_contexts:,} passages")


def without_marks(line: str) -> str:
    """A line of WikiText as one writes."""
    line = re.sub(r" @(.)@ ", r"\1", line)
    line = re.sub(r" (['’](?:s|t|re|ve|ll|d|m)\b)", r"\1", line)
    line = re.sub(r" ([,.;:!?)\]%])", r"\1", line)
    line = re.sub(r"([(\[$£]) ", r"\1", line)
    return re.sub(r'" ([^"]*) "', r'"\1"', line).strip()


def questions(passage: str, rng: random.Random) -> list[Example]:
    """Questions on a passage with blanks; none where nothing recurs, or its length is not right."""
    if passage.startswith("=") or len(passage.split()) not in WORDS:
        return []
    sentences = [match.span() for match in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|$)", passage)]
    recurring = recurring_spans(passage)
    masked: dict[tuple[int, int], tuple[int, int]] = {}  # sentence: span
    for places in rng.sample(recurring, len(recurring)):
        rng.shuffle(places)
        free = [
            (sentence, place)
            for place in places
            for sentence in sentences
            if sentence[0] <= place[0] and place[1] <= sentence[1] and sentence not in masked
        ]
        kept = [place for place in places if not _overlaps(place, masked.values())]
        if free and len(masked) < QUESTIONS and any(place != free[0][1] for place in kept):
            sentence, place = free[0]
            masked[sentence] = place
    context = passage
    for start, end in sorted(masked.values(), reverse=True):
        context = context[:start] + BLANK + context[end:]
    return [
        Example("", context, _around(passage[a:start], passage[end:b]), (passage[start:end],))
        for (a, b), (start, end) in sorted(masked.items())
        if re.search(rf"(?<!\w){re.escape(passage[start:end])}(?!\w)", context)
    ]


def recurring_spans(passage: str) -> list[list[tuple[int, int]]]:
    """The places of each name or number that the passage contains twice or more."""
    places: dict[str, list[tuple[int, int]]] = {}
    for match in _NAME_OR_NUMBER.finditer(passage):
        if len(match[0].split()) <= SPAN_WORDS and not _is_common(match, passage):
            places.setdefault(match[0], []).append(match.span())
    return [found for _, found in sorted(places.items()) if len(found) > 1]


def _is_common(match: re.Match, passage: str) -> bool:
    """Whether a capital letter may only say that a sentence begins."""
    begins = match.start() == 0 or passage[: match.start()].rstrip()[-1:] in '.!?"'
    return begins and " " not in match[0] and not match[0][0].isdigit()


def _overlaps(place: tuple[int, int], others) -> bool:
    return any(place[0] < end and start < place[1] for start, end in others)


def _around(before: str, after: str) -> str:
    """The sentence with its blank, cut to QUESTION_WORDS around it."""
    half = QUESTION_WORDS // 2
    left, right = before.split(" "), after.split(" ")
    return " ".join(left[-half:]) + BLANK + " ".join(right[:half])


if __name__ == "__main__":
    run_script(main, parse_args)
