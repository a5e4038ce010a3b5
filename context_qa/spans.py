"""The spans of a context as the only things that may be said about it."""

import itertools
import re
from collections.abc import Collection, Sequence

from mamba_lm.choices import Choice
from squad_utils import NORMALIZED_NO_ANSWER, abstains, answer_text, normalize_answer

_PIECE = re.compile(r"\s*\S+")  # tokenizers never join what stands on two sides of a blank
_START = re.compile(r"\w+|[^\w\s]")  # a span begins at a word or a mark
_ADDED = len(answer_text(""))


class Spans:
    """A context's spans as token sequences that follow a prompt, `choices`.

    A span begins at a word or a mark and is at most max_tokens long, tokenised as an answer with
    the rest of the context after it; it may end after any token that ends a character, and does
    before the first of stop_ids. It is not scored as abstaining, as articles, punctuation and
    NO_ANSWER itself are. The tokenizer must be a fast one, which knows where tokens stand.
    """

    def __init__(self, tokenizer, context: str, max_tokens: int, stop_ids: Collection[int] = ()):
        self.context = context
        self.choices: list[Choice] = []
        self._bounds: list[tuple[int, list[int]]] = []  # the start and the possible ends of each
        self._holds_no_answer = NORMALIZED_NO_ANSWER in normalize_answer(context)
        pieces = list(_PIECE.finditer(context))
        starts = [
            (match.start(), place)
            for place, piece in enumerate(pieces)
            for match in _START.finditer(context, piece.start(), piece.end())
        ]
        if not starts:
            return
        heads = [answer_text(context[start : pieces[place].end()]) for start, place in starts]
        texts = [piece.group() for piece in pieces]
        encoded = tokenizer.backend_tokenizer.encode_batch(texts + heads, add_special_tokens=False)
        tails = encoded[: len(pieces)]
        first = list(itertools.accumulate((len(tail.ids) for tail in tails), initial=0))
        ids = [token for tail in tails for token in tail.ids]
        ends = [
            piece.start() + end
            for piece, tail in zip(pieces, tails, strict=True)
            for _, end in tail.offsets
        ]
        for (start, place), head in zip(starts, encoded[len(pieces) :], strict=True):
            rest = slice(first[place + 1], first[place + 1] + max(max_tokens - len(head.ids), 0))
            own_ends = [start + end - _ADDED for _, end in head.offsets]
            self._add(
                start,
                (head.ids + ids[rest])[:max_tokens],
                (own_ends + ends[rest])[:max_tokens],
                stop_ids,
            )

    def _add(self, start: int, ids: list[int], ends: list[int], stop_ids: Collection[int]) -> None:
        length = next((n for n, token in enumerate(ids) if token in stop_ids), len(ids))
        # Tokens that share a character have one end: only the last of them ends it.
        may_end = [end > start and end != after for end, after in itertools.pairwise([*ends, -1])]
        for n in range(length):
            if may_end[n]:
                may_end[n] = not abstains(self.context[start : ends[n]])
                if may_end[n] and not self._holds_no_answer:
                    break  # what is longer holds a word too
        while length and not may_end[length - 1]:
            length -= 1
        if length:
            self.choices.append(Choice(ids[:length], may_end[:length]))
            self._bounds.append((start, ends))

    def text(self, token_ids: Sequence[int]) -> str | None:
        """The span that was said, blanks stripped; None if it was none."""
        for choice, (start, ends) in zip(self.choices, self._bounds, strict=True):
            if choice.says(token_ids):
                return self.context[start : ends[len(token_ids) - 1]].strip()
        return None
