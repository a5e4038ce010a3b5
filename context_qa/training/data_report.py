"""The examples that training reads: cut to a length, and counted in a report."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from common.errors import UserError
from context_qa.batches import GroupedBatches
from context_qa.prompts import PromptTokens
from squad_utils import NO_ANSWER, Example, answer_text, prompt_parts

CHUNK = 4096  # texts that are tokenised together: bounds memory


class CutExamples(NamedTuple):
    """Examples that fit, and the numbers of those whose context was cut, of those dropped, and of
    too long ones whose answer_start is wrong."""

    examples: list[Example]
    num_cut: int
    num_dropped: int
    num_misplaced: int


def cut_to_length(
    examples: Sequence[Example], tokenizer, prompt_order: str, max_length: int | None
) -> CutExamples:
    """Examples of at most max_length tokens, end-of-text included; UserError if none is left.

    A longer one keeps as many words of its context as fit around the answer. The answer's place is
    answer_start, or, if that is missing or wrong, where the context first contains it (as words of
    its own, if it does so anywhere). The share of the words before it is a function of the
    example's id. An example is dropped if its context does not contain the answer as it is written,
    or if question and answer leave no room.
    """
    if max_length is None:
        return CutExamples(list(examples), 0, 0, 0)
    fitting: list[Example | None] = list(examples)
    lengths = _lengths(examples, tokenizer, prompt_order)
    too_long = [place for place, length in enumerate(lengths) if length > max_length]
    cut = _cut([examples[place] for place in too_long], tokenizer, prompt_order, max_length)
    for place, example in zip(too_long, cut, strict=True):
        fitting[place] = example
    kept = [example for example in fitting if example is not None]
    if not kept:
        raise UserError(f"max_length {max_length} is too short for every example; give more tokens")
    num_dropped = len(examples) - len(kept)
    num_misplaced = sum(_is_misplaced(examples[place]) for place in too_long)
    return CutExamples(kept, len(too_long) - num_dropped, num_dropped, num_misplaced)


def _lengths(examples: Sequence[Example], tokenizer, prompt_order: str) -> list[int]:
    """Tokens of prompt and target, or with NO_ANSWER as the target, if that is longer."""
    parts = [prompt_parts(e.context, e.question, prompt_order) for e in examples]
    prefixes, suffixes = (_num_tokens(texts, tokenizer) for texts in zip(*parts, strict=True))
    targets = _num_tokens([answer_text(example.target) for example in examples], tokenizer)
    [no_answer] = _num_tokens([answer_text(NO_ANSWER)], tokenizer)
    return [
        prefix + suffix + max(target, no_answer) + 1
        for prefix, suffix, target in zip(prefixes, suffixes, targets, strict=True)
    ]


def _num_tokens(texts: Sequence[str], tokenizer) -> list[int]:
    """The number of tokens of each text; equal texts are tokenized once."""
    unique = list(dict.fromkeys(texts))
    lengths: dict[str, int] = {}
    for start in range(0, len(unique), CHUNK):
        chunk = unique[start : start + CHUNK]
        lengths |= zip(chunk, map(len, PromptTokens(tokenizer).encode(chunk)), strict=True)
    return [lengths[text] for text in texts]


def _cut(
    examples: Sequence[Example], tokenizer, prompt_order: str, max_length: int
) -> list[Example | None]:
    """Each with the most words that fit, None where too few do: one bisection for all."""
    windows = [_Window(example) for example in examples]
    fitting = [window.least - 1 for window in windows]
    too_many = [max(len(window.words), window.least) for window in windows]
    while open_ := [i for i in range(len(windows)) if too_many[i] - fitting[i] > 1]:
        middle = [(fitting[i] + too_many[i]) // 2 for i in open_]
        tried = [windows[i].with_words(count) for i, count in zip(open_, middle, strict=True)]
        lengths = _lengths(tried, tokenizer, prompt_order)
        for i, count, length in zip(open_, middle, lengths, strict=True):
            (fitting if length <= max_length else too_many)[i] = count
    return [
        window.with_words(count) if count >= window.least else None
        for window, count in zip(windows, fitting, strict=True)
    ]


class _Window:
    """The part of an example's context around the answer, by its number of words."""

    def __init__(self, example: Example):
        self.example, context = example, example.context
        self.words = [match.span() for match in re.finditer(r"\S+", context)]
        self.share = random.Random(example.id).random()  # of the other words, before the answer
        start = _find_answer(example) if example.is_answerable else 0
        end = start + len(example.target) if example.is_answerable else 0
        inside = [i for i, (a, b) in enumerate(self.words) if a < end and start < b]
        self.first, self.num_answer_words = (inside[0] if inside else 0), len(inside)
        # At least one word; more than there are where the answer is not found.
        self.least = max(self.num_answer_words, 1) if start >= 0 else len(self.words) + 1

    def with_words(self, count: int) -> Example:
        before = round(self.share * max(count - self.num_answer_words, 0))
        begin = min(max(self.first - before, 0), len(self.words) - count)
        (first, _), (_, end) = self.words[begin], self.words[begin + count - 1]
        start = self.example.answer_start
        return replace(
            self.example,
            context=self.example.context[first:end],
            answer_start=None if start is None else start - first,
        )


def _find_answer(example: Example) -> int:
    """Where the answer begins: at answer_start, or else preferably not inside of a word; -1 if
    nowhere."""
    answer, context = example.target, example.context
    if example.answer_start is not None and not _is_misplaced(example):
        return example.answer_start
    as_words = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", context)
    return as_words.start() if as_words else context.find(answer)


def _is_misplaced(example: Example) -> bool:
    """Whether answer_start is not where the answer is: some data counts bytes, or UTF-16."""
    start = example.answer_start
    return start is not None and not (
        start >= 0 and example.context.startswith(example.target, start)
    )


@dataclass(frozen=True)
class DataReport:
    """Counts of what all processes together read. Tokens and examples are those of the first epoch;
    a context's tokens count each time a batch reads it."""

    questions: int
    answerable: int
    contexts: int
    negatives: int
    tokens: int
    loss_tokens: int
    longest: int  # example, in tokens
    cut: int
    dropped: int
    misplaced: int = 0  # too long ones whose answer_start is wrong

    def __str__(self) -> str:
        lines = [
            f"data: {self.questions:,} questions, {self.answerable:,} of them answerable, on "
            f"{self.contexts:,} contexts",
            f"an epoch: {self.questions + self.negatives:,} examples, {self.negatives:,} of them "
            f"negatives; {self.tokens:,} tokens, loss on {self.loss_tokens / self.tokens:.1%}; the "
            f"longest example has {self.longest:,}",
        ]
        if self.cut or self.dropped:
            lines.append(f"too long: {self.cut:,} cut around the answer, {self.dropped:,} dropped")
        if self.misplaced:
            lines.append(
                f"answer_start is wrong in {self.misplaced:,} of the too long ones: they were cut "
                "around the answer's first occurrence"
            )
        return "\n".join(lines)


def make_data_report(
    data: CutExamples,
    batches: GroupedBatches,
    tokenizer,
    prompt_order: str,
    max_length: int | None = None,
) -> DataReport:
    """The report on the batches of these examples."""
    of_epoch = batches.for_all_processes()
    pairings = [pairing for batch in of_epoch for pairing in batch]
    parts = [prompt_parts(p.context, p.example.question, prompt_order) for p in pairings]
    prefixes, suffixes = (_num_tokens(texts, tokenizer) for texts in zip(*parts, strict=True))
    targets = _num_tokens([answer_text(pairing.target) for pairing in pairings], tokenizer)
    tokens = loss_tokens = longest = place = 0
    for batch in of_epoch:
        read: dict[tuple[str, int], int] = {}
        for pairing in batch:
            rest, target = suffixes[place] + targets[place], targets[place] + 1
            prefix = prefixes[place]
            if max_length is not None and pairing.target == NO_ANSWER:
                prefix = min(prefix, max(max_length - rest - 1, 0))
            read[parts[place][0], prefix] = prefix
            tokens += rest
            loss_tokens += target
            longest = max(longest, prefix + rest + 1)
            place += 1
        tokens += sum(read.values())
    return DataReport(
        questions=len(data.examples),
        answerable=len(batches.answerable),
        contexts=len({example.context for example in data.examples}),
        negatives=batches.num_negatives,
        tokens=tokens,
        loss_tokens=loss_tokens,
        longest=longest,
        cut=data.num_cut,
        dropped=data.num_dropped,
        misplaced=data.num_misplaced,
    )
