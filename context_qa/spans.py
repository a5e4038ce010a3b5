"""Restrict answers to spans of the context: the spans as token sequences."""

import bisect
import functools
import itertools
from collections.abc import Collection, Sequence

import regex

from common.errors import UserError
from common.text import UNSPACED
from mamba_lm.choosers import TokenSequence
from mamba_lm.tokenizer import encode, encode_with_offsets, require_offsets
from squad_utils import NORMALIZED_NO_ANSWER, answer_text, folded_answer, is_scored_as_empty

SPAN_BORDERS = ("words", "characters")
_PIECE = regex.compile(r"\s*\S+")
_CHARACTER = regex.compile(r"\X")  # a grapheme: a letter with its accents is one
# A word with the marks that belong to its letters; or one character that is not of a word, or whose
# script is written without spaces.
_WORD = regex.compile(
    rf"(?:(?!{UNSPACED.pattern})[\p{{L}}\p{{N}}_][\p{{M}}\u00ad\u200c\u200d\u2060]*)+|(?!\s)\X"
)
_ADDED = len(answer_text(""))
_PROBES = (  # words, digits, punctuation and accents next to each other, and several spaces
    "The \"Wild Swan\" (built in 1998) has 2,150 rooms; it's $19.75, isn't it?",
    "Zo\u00e9  Br\u00fbl\u00e9 \u2013 na\u00efve, 50% of it...\n\tU.S.A., St. John's 3-2 win!",
    "unbelievable internationalisation 12345678 \u6771\u4eac\u30bf\u30ef\u30fc. Jose\u0301 said",
)


class Spans:
    """The spans of a context as `sequences` of tokens that follow a prompt.

    A span starts at a word or a punctuation mark, has at most max_tokens tokens, and contains none
    of stop_ids. Its tokens are those of the same text as an answer in training. It ends after a
    word or a punctuation mark; with `borders` "characters", after any character. Spans that are
    scored as the empty answer are excluded: articles, punctuation and NO_ANSWER itself. The
    tokenizer is one that `require_pieces` accepts.
    """

    def __init__(
        self,
        tokenizer,
        context: str,
        max_tokens: int,
        stop_ids: Collection[int] = (),
        borders: str = "words",
    ):
        self.context = context
        self.sequences: list[TokenSequence] = []
        # Of each sequence: the start in the context, and the end of each token.
        self._bounds: list[tuple[int, list[int | None]]] = []
        no_answer = NORMALIZED_NO_ANSWER.replace(" ", "")
        self._contains_no_answer = no_answer in "".join(folded_answer(context).split())
        self._characters = [match.end() for match in _CHARACTER.finditer(context)]
        self._ends = {match.end() for match in _WORD.finditer(context)}
        if borders == "characters":
            self._ends = set(self._characters)
        pieces = list(_PIECE.finditer(context))
        starts = [
            (match.start(), place)
            for place, piece in enumerate(pieces)
            for match in _WORD.finditer(context, piece.start(), piece.end())
        ]
        if not starts:
            return
        heads = [answer_text(context[start : pieces[place].end()]) for start, place in starts]
        texts = [piece.group() for piece in pieces]
        encoded = encode_with_offsets(tokenizer, texts + heads)
        tails = encoded[: len(pieces)]
        first = list(itertools.accumulate((len(ids) for ids, _ in tails), initial=0))
        tail_ids = [token for ids, _ in tails for token in ids]
        tail_ends = [
            self._character_end(piece.start(), *place)
            for piece, (_, offsets) in zip(pieces, tails, strict=True)
            for place in offsets
        ]
        for (start, place), (ids, offsets) in zip(starts, encoded[len(pieces) :], strict=True):
            # One token more than allowed shows whether the last allowed one ends a character.
            rest = slice(first[place + 1], first[place + 1] + max(max_tokens + 1 - len(ids), 0))
            own_ends = [self._character_end(start - _ADDED, *place) for place in offsets]
            self._add(start, ids + tail_ids[rest], own_ends + tail_ends[rest], max_tokens, stop_ids)

    def _character_end(self, shift: int, start: int, end: int) -> int | None:
        """The end of the character in which a token ends: tokenizers that normalise may give an
        offset before the accent of a letter. None for a token without a character, such as a space
        that the offsets exclude."""
        if start == end or shift + end <= 0:
            return None
        return self._characters[bisect.bisect_left(self._characters, shift + end)]

    def _add(
        self,
        start: int,
        ids: list[int],
        ends: list[int | None],
        max_tokens: int,
        stop_ids: Collection[int],
    ) -> None:
        length = next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))
        length = min(length, max_tokens)
        may_end, after = [False] * len(ids), -1
        for n in reversed(range(len(ids))):
            # Only the last of the tokens that share a character ends it.
            if ends[n] is not None:
                may_end[n] = start < ends[n] != after and ends[n] in self._ends
                after = ends[n]
        for n in range(length):
            if may_end[n]:
                may_end[n] = not is_scored_as_empty(self.context[start : ends[n]])
                if may_end[n] and not self._contains_no_answer:
                    break  # longer spans contain a word too
        while length and not may_end[length - 1]:
            length -= 1
        if length:
            self.sequences.append(TokenSequence(ids[:length], may_end[:length]))
            self._bounds.append((start, ends))

    def text(self, token_ids: Sequence[int]) -> str | None:
        """The span of generated tokens, without outer spaces; None if they are not a span."""
        for sequence, (start, ends) in zip(self.sequences, self._bounds, strict=True):
            if sequence.contains(token_ids):
                return self.context[start : ends[len(token_ids) - 1]].strip()
        return None

    def items(self) -> list[tuple[str, list[int]]]:
        """Every span, as text and as token ids."""
        return [
            (self.context[start : ends[n]], list(sequence.token_ids[: n + 1]))
            for sequence, (start, ends) in zip(self.sequences, self._bounds, strict=True)
            for n, may_end in enumerate(sequence.may_end)
            if may_end
        ]


@functools.lru_cache(maxsize=4)
def require_pieces(tokenizer) -> None:
    """Raise UserError unless a text between spaces has the same tokens alone and within a longer
    text, as with byte-level BPE. Otherwise spans, whose tokens are joined from such pieces, would
    have other tokens than the answers in training."""
    require_offsets(tokenizer)
    wrong = total = 0
    for probe in _PROBES:
        spans = Spans(tokenizer, probe, max_tokens=len(probe)).items()
        expected = encode(tokenizer, [answer_text(text) for text, _ in spans])
        wrong += sum(ids != other for (_, ids), other in zip(spans, expected, strict=True))
        total += len(spans)
    if wrong or not total:
        raise UserError(
            f"constrain_to_context: the tokenizer {tokenizer.name_or_path} gives a text other "
            f"tokens within a longer text than alone ({wrong} of {total} spans tried); use a model "
            "with another tokenizer, such as byte-level BPE, or answer without this constraint"
        )
