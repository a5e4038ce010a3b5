"""The spans of a context as the only things that may be said about it."""

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
_CHARACTER = regex.compile(r"\X")  # as people count them: a letter with its accents is one
# A word with the marks that belong to its letters; or a character that is none, or that is written
# without blanks around it.
_WORD = regex.compile(
    rf"(?:(?!{UNSPACED.pattern})[\p{{L}}\p{{N}}_][\p{{M}}\u00ad\u200c\u200d\u2060]*)+|(?!\s)\X"
)
_ADDED = len(answer_text(""))
_PROBES = (  # words, figures, marks and accents next to each other, with blanks of several kinds
    "The \"Wild Swan\" (built in 1998) has 2,150 rooms; it's $19.75, isn't it?",
    "Zo\u00e9  Br\u00fbl\u00e9 \u2013 na\u00efve, 50% of it...\n\tU.S.A., St. John's 3-2 win!",
    "unbelievable internationalisation 12345678 \u6771\u4eac\u30bf\u30ef\u30fc. Jose\u0301 said",
)


class Spans:
    """A context's spans as token sequences that follow a prompt, `choices`.

    A span begins at a word or a mark, is at most max_tokens long, and has the tokens that the same
    text has as an answer that training teaches; it ends where a word or a mark ends, or, by
    `borders`, any character, and before the first of stop_ids. It is not scored as the empty
    answer, as articles, punctuation and NO_ANSWER itself are. The tokenizer is one that
    `require_pieces` accepts.
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
        self.choices: list[TokenSequence] = []
        self._bounds: list[tuple[int, list[int | None]]] = []  # the start and the ends of each
        said = NORMALIZED_NO_ANSWER.replace(" ", "")
        self._holds_no_answer = said in "".join(folded_answer(context).split())
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
            # One token more than can be said shows whether the last of them ends a character.
            rest = slice(first[place + 1], first[place + 1] + max(max_tokens + 1 - len(ids), 0))
            own_ends = [self._character_end(start - _ADDED, *place) for place in offsets]
            self._add(start, ids + tail_ids[rest], own_ends + tail_ends[rest], max_tokens, stop_ids)

    def _character_end(self, shift: int, start: int, end: int) -> int | None:
        """Where the character ends in which a token does: tokenizers that normalise may count a
        letter without the accent that follows it. None for a token without a character, such as a
        blank of its own that is trimmed."""
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
            # Tokens that share a character have one end: only the last of them ends it.
            if ends[n] is not None:
                may_end[n] = start < ends[n] != after and ends[n] in self._ends
                after = ends[n]
        for n in range(length):
            if may_end[n]:
                may_end[n] = not is_scored_as_empty(self.context[start : ends[n]])
                if may_end[n] and not self._holds_no_answer:
                    break  # what is longer holds a word too
        while length and not may_end[length - 1]:
            length -= 1
        if length:
            self.choices.append(TokenSequence(ids[:length], may_end[:length]))
            self._bounds.append((start, ends))

    def text(self, token_ids: Sequence[int]) -> str | None:
        """The span that was said, blanks stripped; None if it was none."""
        for choice, (start, ends) in zip(self.choices, self._bounds, strict=True):
            if choice.contains(token_ids):
                return self.context[start : ends[len(token_ids) - 1]].strip()
        return None

    def said(self) -> list[tuple[str, list[int]]]:
        """Every span, as text and as the tokens by which it is said."""
        return [
            (self.context[start : ends[n]], list(choice.token_ids[: n + 1]))
            for choice, (start, ends) in zip(self.choices, self._bounds, strict=True)
            for n, may_end in enumerate(choice.may_end)
            if may_end
        ]


@functools.lru_cache(maxsize=4)
def require_pieces(tokenizer) -> None:
    """UserError unless a text between blanks has the same tokens within a longer text and alone, as
    with byte-level BPE: else spans put together from pieces would have other tokens than the
    answers that training teaches."""
    require_offsets(tokenizer)
    wrong = total = 0
    for probe in _PROBES:
        spans = Spans(tokenizer, probe, max_tokens=len(probe)).said()
        wanted = encode(tokenizer, [answer_text(text) for text, _ in spans])
        wrong += sum(ids != other for (_, ids), other in zip(spans, wanted, strict=True))
        total += len(spans)
    if wrong or not total:
        raise UserError(
            f"constrain_to_context: the tokenizer {tokenizer.name_or_path} tokenises a text "
            f"otherwise within a longer one ({wrong} of {total} spans tried); it needs one that "
            "does not, such as byte-level BPE"
        )
