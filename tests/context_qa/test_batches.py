"""Training examples: the parts of a prompt, their targets, and the order in which they come."""

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from common.errors import UserError
from context_qa.batches import GroupedBatches, Pairing, continuation, pack
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.training.prefix_suffix import Item
from squad_utils import NO_ANSWER, PROMPT_ORDERS, Example, prompt_parts

ROOT = Path(__file__).parents[2]
CAT = Example("cat", "Bo is a cat.", "What is Bo?", ("a cat", "cat"))
UNKNOWN = Example("unknown", "Bo is a cat.", "How old is Bo?", ())

# Five contexts with one to three questions each, those of a context not in a row.
EXAMPLES = [
    Example(
        f"{context}-{number}", f"Person {context} has number {context}7.", f"{context}?", answers
    )
    for number, contexts in enumerate(("abcde", "bcd", "d"))
    for context in contexts
    for answers in [() if (context, number) == ("c", 1) else (f"{context}7",)]
]


class WholeTextTokenizer:
    """Makes a token of the whole text, and a first one if special tokens are not declined."""

    eos_token_id, eos_token = "<eos>", "<eos>"
    unk_token_id, unk_token, added_tokens_decoder = None, None, {}

    def __call__(self, texts: list[str], add_special_tokens: bool, split_special_tokens: bool):
        first = ["<bos>"] if add_special_tokens else []
        return {"input_ids": [[*first, text] for text in texts]}


def pairings(examples, negatives=None, seed=0, epoch=0) -> list[Pairing]:
    """All of an epoch in one batch."""
    batches = GroupedBatches(examples, 100, negatives, seed)
    batches.set_epoch(epoch)
    (batch,) = batches
    return batch


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_parts_are_tokenised_apart_and_end_of_text_is_appended(order):
    prefix, suffix = prompt_parts(CAT.context, CAT.question, order)
    example = continuation(Pairing(CAT, CAT.context), WholeTextTokenizer(), order)
    assert example == Item.with_target([prefix], [suffix], [" a cat", "<eos>"])


def test_target_is_no_answer_on_other_contexts_and_where_there_is_none():
    def target(example: Example, context: str) -> object:
        return continuation(
            Pairing(example, context), WholeTextTokenizer(), PROMPT_ORDERS[0]
        ).labels[1]

    assert target(CAT, CAT.context) == " a cat"
    assert target(CAT, "Cy is a dog.") == f" {NO_ANSWER}"
    assert target(UNKNOWN, UNKNOWN.context) == f" {NO_ANSWER}"


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_ids_of_the_demo_tokenizer_read_back_as_the_prompt(order):
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    item = continuation(Pairing(CAT, CAT.context), tokenizer, order)
    ids = [*item.prefix, *item.suffix]
    assert tokenizer.decode(ids[:-1]) == (
        "".join(prompt_parts(CAT.context, CAT.question, order)) + " a cat"
    )
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode([token for token in item.labels[:-1] if token >= 0]) == " a cat"


def test_without_negatives_every_question_comes_once_on_its_own_context():
    drawn = pairings(EXAMPLES)
    assert sorted(p.example.id for p in drawn) == sorted(e.id for e in EXAMPLES)
    assert all(p.context == p.example.context for p in drawn)


@pytest.mark.parametrize("negatives", [None, "random", "hard"])
def test_contexts_are_contiguous(negatives):
    for epoch in range(3):
        contexts = [
            key for key, _ in groupby(pairings(EXAMPLES, negatives, 0, epoch), lambda p: p[1])
        ]
        assert len(contexts) == len(set(contexts)) == 5


@pytest.mark.parametrize("ratio, expected", [(1.0, 7), (0.5, 3), (0.1, 0), (2.0, 15), (1.5, 11)])
def test_negatives_fill_up_the_ratio_that_the_datas_own_begin(ratio, expected):
    """Of nine questions one is unanswerable."""
    seen = []
    for epoch in range(3):
        batches = GroupedBatches(EXAMPLES, 100, "random", negative_ratio=ratio)
        batches.set_epoch(epoch)
        [drawn] = batches
        assert len(drawn) == batches.num_pairings == 9 + expected
        others = [p for p in drawn if p.context != p.example.context]
        assert len(others) == expected
        assert all(p.target == NO_ANSWER and p.example.is_answerable for p in others)
        times = Counter(p.example.id for p in others)
        assert max(times.values(), default=0) <= math.ceil(ratio)
        assert len(times) == min(expected, 8)
        seen.append(frozenset(others))
    assert len(set(seen)) == (3 if expected else 1)


def test_a_question_is_asked_on_no_more_contexts_than_there_are():
    assert GroupedBatches(EXAMPLES, 9, "random", negative_ratio=1e9).num_negatives == 8 * 4


def test_unanswerable_questions_alone_need_no_negatives():
    assert GroupedBatches([UNKNOWN], 4, "random").num_pairings == 1


def test_an_epoch_changes_negatives_and_order():
    first, second = (pairings(EXAMPLES, "random", 0, epoch) for epoch in (0, 1))

    def negatives(drawn: list[Pairing]) -> set[Pairing]:
        return {p for p in drawn if p.context != p.example.context}

    def own(drawn: list[Pairing]) -> list[Pairing]:
        return [p for p in drawn if p.context == p.example.context]

    assert negatives(first) != negatives(second)
    assert own(first) != own(second) and set(own(first)) == set(own(second))


def test_questions_of_a_context_change_places():
    """A context's own questions do not always come before those that it cannot answer."""
    orders = {
        tuple(p.example.id for p in pairings(EXAMPLES, None, 0, epoch) if p.context[7] == "d")
        for epoch in range(10)
    }
    assert len(orders) > 1


def test_order_is_a_function_of_seed_and_epoch():
    batches = GroupedBatches(EXAMPLES, 100, "random", seed=3)
    first = list(batches)
    assert list(batches) == first == [pairings(EXAMPLES, "random", 3)]
    batches.set_epoch(1)
    assert list(batches) == [pairings(EXAMPLES, "random", 3, epoch=1)] != first
    batches.set_epoch(0)
    assert list(batches) == first
    assert pairings(EXAMPLES, None, 3) != pairings(EXAMPLES, None, 4)


def test_all_come_even_where_no_context_is_fit():
    everywhere = replace(EXAMPLES[0], id="everywhere", answers=("number",))  # in all contexts
    for examples, negatives, expected in (
        (EXAMPLES, None, 9),
        (EXAMPLES, "random", 9 + 7),
        ([*EXAMPLES, everywhere], "random", 10 + 8),
        ([CAT], "random", 1),
    ):
        assert GroupedBatches(examples, 4, negatives).num_pairings == expected
        for epoch in range(3):
            assert len(pairings(examples, negatives, 0, epoch)) == expected


MANY = [
    Example(f"{c}.{q}", f"Number {c} of all.", f"Q{q} of {c}?", (f"{c}{q}",))
    for c, count in enumerate([1, 1, 2, 3, 5, 5, 8, 13, 40])
    for q in range(count)
]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (7, 1), (16, 1), (7, 2), (16, 3)])
def test_every_process_gets_as_many_batches_and_nothing_comes_twice(
    batch_size, world_size, grouped
):
    for epoch in (0, 1):
        parts = []
        for rank in range(world_size):
            batches = GroupedBatches(MANY, batch_size, "random", 0, rank, world_size, grouped)
            batches.set_epoch(epoch)
            parts.append(list(batches))
            assert len(parts[-1]) == len(batches)
        assert len({len(part) for part in parts}) == 1
        drawn = [pairing for part in parts for batch in part for pairing in batch]
        assert len(drawn) == len(set(drawn)) == 2 * len(MANY)
        sizes = {len(batch) for part in parts for batch in part}
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [16, 24, 1000])
def test_a_step_reads_the_same_however_it_is_split(size):
    """In one batch, in several, by several processes; also where nothing divides evenly."""

    def steps(batch_size: int, world_size: int, accumulation: int) -> list[set[Pairing]]:
        parts = []
        for rank in range(world_size):
            batches = GroupedBatches(
                MANY, batch_size, "random", 0, rank, world_size, accumulation=accumulation
            )
            batches.set_epoch(1)
            parts.append(list(batches))
            assert len(parts[-1]) == len(batches)
        count = len(parts[0]) // accumulation
        assert count * accumulation == len(parts[0])
        sizes = {len(batch) for part in parts for batch in part}
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
        return [
            {pairing for part in parts for batch in
             part[at * accumulation : (at + 1) * accumulation] for pairing in batch}
            for at in range(count)
        ]  # fmt: skip

    wanted = steps(size, 1, 1)
    assert sum(map(len, wanted)) == 2 * len(MANY)
    for world_size, accumulation in ((1, 4), (2, 1), (2, 2), (4, 2)):
        assert steps(size // world_size // accumulation, world_size, accumulation) == wanted


def test_fewer_examples_than_batches_a_step():
    batches = GroupedBatches(EXAMPLES[:3], 4, accumulation=8)
    assert sorted(map(len, batches)) == [1, 1, 1]


def test_contexts_stay_whole_where_they_can():
    """Eleven batches of 14 or so, nine contexts with 2 to 80 pairings."""
    batches = list(GroupedBatches(MANY, 16))
    splits = sum(len({p.context for p in batch}) for batch in batches) - 9
    assert len(batches) == 5
    assert splits <= 4  # the context of 40 needs three batches
    shuffled = list(GroupedBatches(MANY, 16, grouped=False))
    assert sum(len({p.context for p in batch}) for batch in shuffled) - 9 > 10


def test_no_batch_is_empty():
    """Nine pairings, batches of one: four processes cannot all get as many of them."""
    parts = [list(GroupedBatches(EXAMPLES, 1, rank=rank, world_size=4)) for rank in range(4)]
    assert sorted(len(batch) for part in parts for batch in part) == [1] * 7 + [2]
    assert {len(part) for part in parts} == {2}


def test_fewer_examples_than_processes():
    with pytest.raises(UserError, match="9 examples are too few for 10 processes"):
        GroupedBatches(EXAMPLES, 4, world_size=10)


@pytest.mark.parametrize("seed", range(30))
def test_packing_fills_every_batch_and_splits_few_groups(seed):
    rng = random.Random(seed)
    groups = [[(g, i) for i in range(rng.randint(1, 12))] for g in range(rng.randint(1, 60))]
    total = sum(map(len, groups))
    number = rng.randint(1, total)
    sizes = [total // number + (i < total % number) for i in range(number)]
    batches = pack(groups, sizes)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(item for batch in batches for item in batch) == sorted(
        item for group in groups for item in group
    )
    if min(sizes) >= 24:
        parts = sum(len({g for g, _ in batch}) for batch in batches)
        assert parts - len(groups) <= number
