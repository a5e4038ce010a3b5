"""Training examples grouped by context: questions on their own and on other contexts."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

from common.errors import UserError
from context_qa.negatives import NegativeSampler
from mamba_lm.tokenizer import token_ids
from mamba_lm.training.prefix_suffix import Item
from squad_utils import NO_ANSWER, Example, answer_text, prompt_parts


class Pairing(NamedTuple):
    """A question asked on a context: its own, or one where NO_ANSWER is right."""

    example: Example
    context: str

    @property
    def target(self) -> str:
        return self.example.target if self.context == self.example.context else NO_ANSWER


def continuation(
    pairing: Pairing, tokenizer, prompt_order: str, max_length: int | None = None
) -> Item:
    """Token ids of a pairing's prompt in its two parts and of its target with end-of-text.

    Where NO_ANSWER is right, a prefix that is too long for max_length loses its end; that of an
    answer may hold it, and stays (see `training_data.cut_to_length`).
    """
    prefix, suffix = prompt_parts(pairing.context, pairing.example.question, prompt_order)
    prefix_ids, prompt = token_ids(tokenizer, prefix), token_ids(tokenizer, suffix)
    target = [*token_ids(tokenizer, answer_text(pairing.target)), tokenizer.eos_token_id]
    if max_length is not None and pairing.target == NO_ANSWER:
        prefix_ids = prefix_ids[: max(max_length - len(prompt) - len(target), 0)]
    return Item.with_target(prefix_ids, prompt, target, pairing.example.id)


class GroupedBatches(Sampler[list[Pairing]]):
    """Batches of one epoch in which a context's pairings stand together: it is read once for all.

    Contexts come in a new order each epoch, a function of (seed, epoch). With negatives, answerable
    questions are also asked on contexts that do not answer them, others each epoch, until there are
    `negative_ratio` unanswerable pairings for an answerable one, the examples' own unanswerable
    ones included.

    What an optimiser step reads depends on the product of batch_size, world_size and accumulation
    alone: first pairings are packed into steps, then a step's into its batches, as many for each
    process. Batches differ by one pairing at most; they hold batch_size at most, or one more where
    one would have to be empty. Without `grouped`, pairings are drawn one by one.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        negatives: str | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        grouped: bool = True,
        negative_ratio: float = 1.0,
        accumulation: int = 1,
    ):
        self.examples, self.seed, self.epoch, self.grouped = examples, seed, 0, grouped
        self.answerable = [example for example in examples if example.is_answerable]
        self.sampler, self.num_negatives = None, 0
        if negatives is not None and self.answerable:
            contexts = {example.context for example in examples}
            self.sampler = NegativeSampler(self.answerable, negatives, seed, contexts)
            unanswerable = len(examples) - len(self.answerable)
            wanted = round(negative_ratio * len(self.answerable)) - unanswerable
            # Whether a context is fit for a question at all is the same in every epoch.
            self.num_askable = sum(c is not None for c in self.sampler.contexts(epoch=0))
            times = min(math.ceil(negative_ratio), len(contexts) - 1)  # that a question is asked
            self.num_negatives = min(max(wanted, 0), self.num_askable * times)
        self.rank, self.world_size = rank, world_size
        self.num_pairings = len(examples) + self.num_negatives
        if self.num_pairings < world_size:
            raise UserError(f"{self.num_pairings} examples are too few for {world_size} processes")
        self.batches_a_step = world_size * min(accumulation, self.num_pairings // world_size)
        wanted = math.ceil(self.num_pairings / (batch_size * self.batches_a_step))
        self.steps = min(wanted, self.num_pairings // self.batches_a_step)  # no batch is empty

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this process."""
        return self.steps * self.batches_a_step // self.world_size

    def __iter__(self) -> Iterator[list[Pairing]]:
        yield from self.of_all_processes()[self.rank :: self.world_size]

    def of_all_processes(self) -> list[list[Pairing]]:
        """The epoch's batches, in the order in which processes take turns."""
        rng = random.Random(f"{self.seed}/{self.epoch}")
        groups = self._groups(self._pairings())
        shuffled = [rng.sample(groups[key], len(groups[key])) for key in
                    rng.sample(list(groups), len(groups))]  # fmt: skip
        steps = pack(shuffled, even_sizes(self.num_pairings, self.steps))
        return [
            batch
            for step in rng.sample(steps, len(steps))
            for batch in pack(
                list(self._groups(step).values()), even_sizes(len(step), self.batches_a_step)
            )
        ]

    def _groups(self, pairings: Iterable[Pairing]) -> dict[object, list[Pairing]]:
        groups: dict[object, list[Pairing]] = {}
        for pairing in pairings:
            groups.setdefault(pairing.context if self.grouped else pairing, []).append(pairing)
        return groups

    def _pairings(self) -> Iterator[Pairing]:
        yield from (Pairing(example, example.context) for example in self.examples)
        if self.num_negatives:
            whole, part = divmod(self.num_negatives, self.num_askable)
            rounds = whole + (part > 0)
            for place in range(rounds):
                yield from self._negatives(
                    self.epoch * rounds + place, self.num_askable if place < whole else part
                )

    def _negatives(self, epoch: int, count: int) -> list[Pairing]:
        """Each question that can be on one other context, or as many of them as `count` says."""
        pairs = zip(self.answerable, self.sampler.contexts(epoch), strict=True)
        drawn = [Pairing(example, context) for example, context in pairs if context is not None]
        if count < len(drawn):
            drawn = random.Random(f"{self.seed}/{epoch}/part").sample(drawn, count)
        return drawn


def even_sizes(total: int, number: int) -> list[int]:
    """So many whole numbers that differ by one at most and sum to the total."""
    smaller, larger = divmod(total, number)
    return [smaller + (place < larger) for place in range(number)]


def pack(groups: Sequence[list], sizes: Sequence[int]) -> list[list]:
    """Batches of exactly these sizes, whose sum is that of the groups', with whole groups where
    possible: each goes to the fullest batch with room for it; one that fits nowhere is split."""
    batches: list[list] = [[] for _ in sizes]
    with_room: list[list[int]] = [[] for _ in range(max(sizes) + 1)]
    for place, size in enumerate(sizes):
        with_room[size].append(place)
    for group in groups:
        while group:
            fitting = range(len(group), len(with_room))
            too_small = range(min(len(group), len(with_room)) - 1, 0, -1)
            room = next(room for room in (*fitting, *too_small) if with_room[room])
            place = with_room[room].pop()
            batches[place] += group[:room]
            with_room[max(room - len(group), 0)].append(place)
            group = group[room:]
    return batches
