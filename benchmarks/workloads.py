"""What several benchmarks use: mamba-130m's shape, a training batch, passages with questions."""

import itertools
import random
from collections.abc import Iterable, Sequence

from context_qa.batches import GroupedBatches, continuation
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.training.prefix_suffix import IGNORED, Item, collate
from squad_utils import PROMPT_ORDERS, Example, read_examples

VOCABULARY, WIDTH = 50277, 768  # of mamba-130m
TRAIN, VALIDATION = "data/demo/train.jsonl", "data/demo/validation.jsonl"


def training_batch(data: str, tokenizer: str, batch_size: int) -> tuple[list[Item], int]:
    """A batch and its number of contexts. Of the first fifty batches of an epoch it is the one in
    which sharing contexts saves a share of the tokens that is nearest to that of all fifty."""
    tokenizer = load_tokenizer("", tokenizer)
    pairings = GroupedBatches(read_examples(data), batch_size, "random")
    batches = [
        [continuation(pairing, tokenizer, PROMPT_ORDERS[0]) for pairing in of_batch]
        for of_batch in itertools.islice(pairings, 50)
    ]
    shared = [num_tokens(items) for items in batches]
    unshared = [num_tokens(map(without_prefix, items)) for items in batches]
    gain = sum(unshared) / sum(shared)
    distances = [abs(u / s - gain) for u, s in zip(unshared, shared, strict=True)]
    items = batches[distances.index(min(distances))]
    return items, len({tuple(item.prefix) for item in items})


def num_tokens(items: Iterable[Item]) -> int:
    """Tokens that the model reads: each prefix once, without padding."""
    batch = collate(items)
    return int(batch["prefix_lengths"].sum() + batch["suffix_lengths"].sum())


def without_prefix(item: Item) -> Item:
    """The same item with nothing to share: its prefix is the beginning of its suffix."""
    labels = [*[IGNORED] * len(item.prefix), *item.labels]
    return Item((), [*item.prefix, *item.suffix], labels)


def sample_passages(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """All questions of `count` passages: of a hundred seeded draws the one whose questions per
    passage are nearest to the data's."""
    passages: dict[str, list[Example]] = {}
    for example in examples:
        passages.setdefault(example.context, []).append(example)
    count = min(count, len(passages))
    wanted = len(examples) / len(passages) * count
    draws = (random.Random(seed).sample(list(passages.values()), count) for seed in range(100))
    return min(draws, key=lambda draw: abs(sum(map(len, draw)) - wanted))
