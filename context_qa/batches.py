"""Training examples grouped by context: questions on their own contexts, and negatives."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

from common.errors import UserError
from context_qa.negatives import NegativeSampler
from context_qa.prompts import PromptTokens
from mamba_lm.training.prefix_suffix import Item
from squad_utils import NO_ANSWER, Example, prompt_parts


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
    """A training item of a pairing: labels on its target and end-of-text.

    Where NO_ANSWER is right, the end of a prefix that is too long for max_length is cut off. Where
    an answer is, it may be in there, so the prefix is not cut (see `data_report.cut_to_length`).
    """
    prefix, suffix = prompt_parts(pairing.context, pairing.example.question, prompt_order)
    tokens = PromptTokens(tokenizer)
    prefix_ids, start = tokens.encode([prefix, suffix])
    [target] = tokens.encode_targets([pairing.target])
    if max_length is not None and pairing.target == NO_ANSWER:
        prefix_ids = prefix_ids[: max(max_length - len(start) - len(target), 0)]
    return Item.with_target(prefix_ids, start, target, pairing.example.id)


class GroupedBatches(Sampler[list[Pairing]]):
    """Batches of one epoch; a context's pairings are in the same batch, so that it is read once.

    The order of the contexts is a function of (seed, epoch). With negatives, answerable questions
    are also paired with contexts that do not answer them, new ones each epoch, until there are
    `negative_ratio` unanswerable pairings for each answerable one, the examples' own unanswerable
    ones included.

    What an optimizer step reads depends only on the product of batch_size, world_size and
    accumulation: pairings are packed into steps, then a step's pairings into its batches, as many
    for each process. Sizes of batches differ by one at most; they are batch_size at most, or one
    more where a batch would have to be empty. Without `grouped`, pairings are drawn one by one.
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
            self.num_askable = sum(c is not None for c in self.sampler.draw_contexts(epoch=0))
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
        yield from self.for_all_processes()[self.rank :: self.world_size]

    def for_all_processes(self) -> list[list[Pairing]]:
        """The epoch's batches, of each process in turn."""
        rng = random.Random(f"{self.seed}/{self.epoch}")
        groups = self._groups(self._pairings())
        shuffled = [rng.sample(groups[key], len(groups[key])) for key in
                    rng.sample(list(groups), len(groups))]  # fmt: skip
        steps = pack(shuffled, split_evenly(self.num_pairings, self.steps))
        return [
            batch
            for step in rng.sample(steps, len(steps))
            for batch in pack(
                list(self._groups(step).values()), split_evenly(len(step), self.batches_a_step)
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
            num_full, rest = divmod(self.num_negatives, self.num_askable)
            rounds = num_full + (rest > 0)
            for place in range(rounds):
                yield from self._negatives(
                    self.epoch * rounds + place, self.num_askable if place < num_full else rest
                )

    def _negatives(self, epoch: int, count: int) -> list[Pairing]:
        """A negative for each question that has one, or for `count` of them drawn at random."""
        pairs = zip(self.answerable, self.sampler.draw_contexts(epoch), strict=True)
        drawn = [Pairing(example, context) for example, context in pairs if context is not None]
        if count < len(drawn):
            drawn = random.Random(f"{self.seed}/{epoch}/part").sample(drawn, count)
        return drawn


def split_evenly(total: int, number: int) -> list[int]:
    """`number` integers that differ by one at most and sum to the total."""
    smaller, larger = divmod(total, number)
    return [smaller + (place < larger) for place in range(number)]


def pack(groups: Sequence[list], sizes: Sequence[int]) -> list[list]:
    """Batches of exactly these sizes, which sum to the size of all groups. Groups are kept together
    where possible: each goes to the fullest batch with room for it, or is split if none has."""
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
