"""Make questions for a reader out of plain articles: recurring names, numbers and dates.

    python -m studies.base_model.make_recall_practice wikipedia13k.txt.xz --output data/recall.jsonl
    python -m studies.base_model.make_recall_practice data/wikipedia13k \\
        --tokenizer models/tokenizer-8k --output data/recall.jsonl

A span that recurs in an article is the answer in one paragraph, which becomes the context; the
question is a sentence from another paragraph of the article with the span masked. The two then
share a fact, not a sentence (recurring spans: Ram et al. 2021, Splinter; questions from cloze
sentences: Lewis et al. 2019). Sentence and paragraph have other words in common, or the question
could not be answered. A token file of pack.py may stand in for the texts.
"""

from common.script import run_script

import argparse
import functools
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.command_line import Parser, positive_int, seed
from common.errors import UserError
from common.output_files import check_inputs_not_overwritten, write_output
from mamba_lm.tokenizer import load_tokenizer_at
from studies.base_model.pack import read_packed, read_texts
from studies.base_model.processes import process_pool
from studies.base_model.text_files import Document, read_documents

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_SPANS = {  # the kind of a span, and what replaces it in the question; dates come first
    "date": (
        rf"(?:\d{{1,2}} (?:{_MONTHS})(?: \d{{4}})?|(?:{_MONTHS}) \d{{1,2}}(?:, \d{{4}})?)",
        "what date",
    ),
    "year": (r"(?:1\d|20)\d\d", "what year"),
    "number": (r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d{2,}", "what number"),
    "name": (r"[A-Z][\w'’-]+(?: (?:of |the |de |von |van )?[A-Z][\w'’-]+)+", "what"),
}
_SPAN = re.compile(
    "|".join(rf"(?P<{kind}>\b(?:{pattern})\b)" for kind, (pattern, _) in _SPANS.items())
)
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"”][.!?]) +(?=[A-Z\"“])")
_WORD = re.compile(r"[^\W\d_]{4,}")
_MIN_SHARED = 2  # words of four letters or more, without those of the span
_LENGTHS = (200, 1500)  # characters of a context
_QUESTION = (40, 250)  # and of a question
_AT_ONCE = 8  # articles


class Mention(NamedTuple):
    """A span in a paragraph's sentence."""

    kind: str
    paragraph: int
    sentence: str
    start: int


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("texts", nargs="+", metavar="TEXT", help=".txt, .txt.xz, or a token file without its .bin")
    add("--tokenizer", metavar="DIR", help="of the token file")
    add("--output", required=True, metavar="FILE", help="JSONL")
    add("--questions", type=positive_int, default=200_000, metavar="N", help="at most (200000)")
    add("--of_paragraph", type=positive_int, default=3, metavar="N", help="at most (default: 3)")
    add("--processes", type=positive_int, default=os.cpu_count(), metavar="N", help="default: all")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")
    # fmt: on
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], args.texts)
    make = functools.partial(practice, seed=args.seed, of_paragraph=args.of_paragraph)
    with process_pool(args.processes) as pool:
        found = pool.imap(make, documents(args.texts, args.tokenizer), _AT_ONCE)
        rows = [json.dumps(row, ensure_ascii=False) for rows in found for row in rows]
    made = len(rows)
    if made > args.questions:
        rows = random.Random(args.seed).sample(rows, args.questions)
    write_output(args.output, "".join(row + "\n" for row in rows))
    print(f"{len(rows):,} of {made:,} questions written to {args.output}")


def documents(texts: list[str], tokenizer: str | None) -> Iterator[Document]:
    for name in texts:
        if not Path(f"{name}.bin").exists():
            yield from read_documents([name])
        elif tokenizer is None:
            raise UserError(f"{name}.bin: give its --tokenizer")
        else:
            for text in read_texts(read_packed(name), load_tokenizer_at(Path(tokenizer))):
                yield Document(text.partition("\n")[0].strip("= "), text)


def practice(document: Document, seed: int = 0, of_paragraph: int = 3) -> list[dict]:
    """Rows with id, title, context, question and answers; a function of the document and seed."""
    paragraphs = [line.strip() for line in document.text.split("\n")[1:] if line.strip()]
    words = [set(map(str.lower, _WORD.findall(paragraph))) for paragraph in paragraphs]
    mentions: dict[str, list[Mention]] = defaultdict(list)
    for place, paragraph in enumerate(paragraphs):
        for span, mention in _mentions(place, paragraph):
            mentions[span].append(mention)
    title_words = set(map(str.lower, _WORD.findall(document.title)))
    candidates: dict[int, list[tuple[float, str, Mention]]] = defaultdict(list)
    for span, where in mentions.items():
        for place in sorted({mention.paragraph for mention in where}):
            if _LENGTHS[0] <= len(paragraphs[place]) <= _LENGTHS[1]:
                best = max(
                    ((_overlap(mention, span, words[place], title_words), mention)
                     for mention in where if mention.paragraph != place),
                    key=lambda scored: scored[0], default=(0, None),
                )  # fmt: skip
                if best[0] >= _MIN_SHARED and best[1].sentence not in paragraphs[place]:
                    candidates[place].append((best[0], span, best[1]))
    rng = random.Random(f"{seed}/{document.title}/{len(document.text)}")
    rows, used = [], set()
    for place in rng.sample(sorted(candidates), len(candidates)):
        # Those that have most in common with the paragraph, no sentence twice.
        for _, span, mention in sorted(candidates[place], key=lambda c: -c[0]):
            key = (mention.sentence, span)
            if (
                key in used
                or sum(row["context"] == paragraphs[place] for row in rows) >= of_paragraph
            ):
                continue
            used.add(key)
            rows.append(
                {
                    "id": f"recall/{document.title}/{len(rows)}",
                    "title": f"recall/{document.title}",
                    "context": paragraphs[place],
                    "question": _question(mention, span),
                    "answers": [span],
                }
            )
    return rows


def _mentions(place: int, paragraph: str) -> Iterator[tuple[str, Mention]]:
    for sentence in _SENTENCE_END.split(paragraph):
        for match in _SPAN.finditer(sentence):
            # A capital at a sentence's beginning says nothing.
            if match.lastgroup != "name" or match.start() > 0:
                yield match[0], Mention(match.lastgroup, place, sentence, match.start())


def _overlap(mention: Mention, span: str, words: set[str], title_words: set[str]) -> int:
    """Words that a mention's sentence shares with a paragraph; 0 where it makes no question."""
    if not _QUESTION[0] <= len(mention.sentence) <= _QUESTION[1]:
        return 0
    if mention.sentence.count(span) > 1:
        return 0
    own = set(map(str.lower, _WORD.findall(mention.sentence)))
    return len((own & words) - title_words - set(map(str.lower, _WORD.findall(span))))


def _question(mention: Mention, span: str) -> str:
    end = mention.start + len(span)
    masked = mention.sentence[: mention.start] + _SPANS[mention.kind][1] + mention.sentence[end:]
    masked = masked.rstrip('.!?"” ') + "?"
    return masked[0].upper() + masked[1:]


if __name__ == "__main__":
    run_script(main, parse_args)
