"""Unanswerable copies: the data's own questions, asked where they have no answer."""

from collections.abc import Mapping, Sequence

from squad_utils import NEGATIVE_KINDS, Example, NegativeSampler

_MARKS = tuple(f"#{kind}" for kind in NEGATIVE_KINDS)


def unanswerable_copies(examples: Sequence[Example], kind: str, seed: int = 0) -> list[Example]:
    """Each answerable question once more, on a context that does not answer it, its id marked by
    the kind: of an unanswerable one nothing is known that could rule a context out.

    Those on one context stand together, contexts in the order of the examples', so that each is
    read once. A question is left out for which no context is fit. See NegativeSampler.
    """
    contexts = NegativeSampler(examples, kind, seed).contexts(epoch=0)
    copies = [
        Example(f"{example.id}#{kind}", context, example.question, (), example.article)
        for example, context in zip(examples, contexts, strict=True)
        if example.is_answerable and context
    ]
    order = {e.context: place for place, e in enumerate(examples)}
    return sorted(copies, key=lambda copy: order[copy.context])


def is_copy(row: Mapping) -> bool:
    """Whether a result is that of an unanswerable copy."""
    return row["id"].endswith(_MARKS) and not row["answers"]
