"""Training examples grouped by context: questions on their own and on other contexts."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Dataset, Sampler

from mamba_lm.training import Continuation
from squad_utils import NO_ANSWER, Example, NegativeSampler, answer_text, prompt_parts


class Pairing(NamedTuple):
    """A question, by its example's place in the data, asked on a context."""

    example: int
    context: str


class ContextQADataset(Dataset[Continuation]):
    """Token ids of pairings. The target is the example's first reference on its own context and
    NO_ANSWER on any other, followed by end-of-text."""

    def __init__(self, examples: Sequence[Example], tokenizer, prompt_order: str):
        self.examples, self.tokenizer, self.prompt_order = examples, tokenizer, prompt_order

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pairing: Pairing) -> Continuation:
        example = self.examples[pairing.example]
        is_own = pairing.context == example.context
        prefix, suffix = prompt_parts(pairing.context, example.question, self.prompt_order)
        target = token_ids(self.tokenizer, answer_text(example.target if is_own else NO_ANSWER))
        return Continuation(
            prefix=token_ids(self.tokenizer, prefix),
            prompt=token_ids(self.tokenizer, suffix),
            target=[*target, self.tokenizer.eos_token_id],
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
        for place, example in enumerate(self.examples):
            yield Pairing(place, example.context)
        if self.negatives is not None:
            for place, context in enumerate(self.negatives.contexts(self.epoch)):
                if context is not None and self.examples[place].is_answerable:
                    yield Pairing(place, context)


def token_ids(tokenizer, text: str) -> list[int]:
    """Tokens of one part of a prompt, without special tokens: parts are tokenised apart."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
