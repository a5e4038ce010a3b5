"""The spans of a context as the only things that may be said about it."""

import re
from collections.abc import Collection
from itertools import pairwise

from mamba_lm.choices import Choice
from squad_utils import answer_text

_PIECE = re.compile(r"\w+|[^\w\s]")  # a span begins at a word or a mark
_WORD = re.compile(r"\S+")


def span_choices(
    tokenizer, context: str, max_tokens: int, stop_ids: Collection[int] = ()
) -> Choice:
    """The context's spans as tokens that follow a prompt; each says the span, blanks stripped.

    A span begins at a word or a mark and is at most max_tokens long, as tokenised together with the
    rest of the context; it ends after any of these tokens that ends a character, before the first
    of stop_ids. The tokenizer must be a fast one, which knows where its tokens stand.
    """
    starts = [piece.start() for piece in _PIECE.finditer(context)]
    ends = [word.end() for word in _WORD.finditer(context)]
    tree = Choice()
    if not starts:
        return tree
    # No word takes less than a token: what is after that many cannot be reached.
    passed, texts = 0, []
    for start in starts:
        while ends[passed] <= start:
            passed += 1
        end = ends[min(passed + max_tokens, len(ends) - 1)]
        texts.append(answer_text(context[start:end]))
    added = len(answer_text(""))
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for start, ids, offsets in zip(
        starts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        length = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        length = min(length, max_tokens)
        is_whole = [end <= after for (_, end), (after, _) in pairwise([*offsets, (1 << 60, 0)])]
        said = [
            context[start : start + end - added].strip() or None if whole else None
            for (_, end), whole in zip(offsets[:length], is_whole, strict=False)
        ]
        while said and said[-1] is None:  # nothing can end inside a character
            said.pop()
        tree.add(ids[: len(said)], said)
    return tree
