"""Training examples grouped by context: questions on their own and on other contexts."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

from mamba_lm.training import Continuation
from squad_utils import NO_ANSWER, Example, NegativeSampler, answer_text, prompt_parts


class Pairing(NamedTuple):
    """A question asked on a context: its own, or one where NO_ANSWER is right."""

    example: Example
    context: str

    @property
    def target(self) -> str:
        return self.example.target if self.context == self.example.context else NO_ANSWER


def continuation(pairing: Pairing, tokenizer, prompt_order: str) -> Continuation:
    """Token ids of a pairing's prompt in its two parts and of its target with end-of-text."""
    prefix, suffix = prompt_parts(pairing.context, pairing.example.question, prompt_order)
    return Continuation(
        prefix=token_ids(tokenizer, prefix),
        prompt=token_ids(tokenizer, suffix),
        target=[*token_ids(tokenizer, answer_text(pairing.target)), tokenizer.eos_token_id],
    )


class GroupedSampler(Sampler[Pairing]):
    """Pairings of one epoch, those of a context in a row: a batch then reads few contexts.

    Contexts come in a new order each epoch, a function of (seed, epoch). With negatives, every
    answerable question is also asked on one context that does not answer it, another each epoch.
    """

    def __init__(self, examples: Sequence[Example], negatives: str | None = None, seed: int = 0):
        self.examples, self.seed, self.epoch = examples, seed, 0
        self.negatives = NegativeSampler(examples, negatives, seed) if negatives else None
        self.length = sum(1 for _ in self._pairings())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Pairing]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        groups: dict[str, list[Pairing]] = {}
        for pairing in self._pairings():
            groups.setdefault(pairing.context, []).append(pairing)
        for context in rng.sample(list(groups), len(groups)):
            yield from rng.sample(groups[context], len(groups[context]))

    def _pairings(self) -> Iterator[Pairing]:
        for example in self.examples:
            yield Pairing(example, example.context)
        if self.negatives is not None:
            contexts = self.negatives.contexts(self.epoch)
            for example, context in zip(self.examples, contexts, strict=True):
                if context is not None and example.is_answerable:
                    yield Pairing(example, context)


def token_ids(tokenizer, text: str) -> list[int]:
    """Tokens of one part of a prompt, without special tokens: parts are tokenised apart."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
