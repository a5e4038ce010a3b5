"""Unanswerable copies: the data's own questions, asked where they have no answer."""

from collections.abc import Sequence

from squad_utils import NEGATIVE_KINDS, Example, NegativeSampler

_MARKS = tuple(f"#{kind}" for kind in NEGATIVE_KINDS)


def unanswerable_copies(examples: Sequence[Example], kind: str, seed: int = 0) -> list[Example]:
    """Each question once more, on a context that does not answer it, its id marked by the kind.

    Those on one context stand together, contexts in the order of the examples', so that each is
    read once. A question for which no context is fit is left out. See NegativeSampler.
    """
    contexts = NegativeSampler(examples, kind, seed).contexts(epoch=0)
    copies = [
        Example(f"{example.id}#{kind}", context, example.question, (), example.article)
        for example, context in zip(examples, contexts, strict=True)
        if context is not None
    ]
    order = {e.context: place for place, e in enumerate(examples)}
    return sorted(copies, key=lambda copy: order[copy.context])


def is_copy(identifier: str) -> bool:
    """Whether a question's id is that of an unanswerable copy."""
    return identifier.endswith(_MARKS)
