"""Training examples: the parts of a prompt, their targets, and the order in which they come."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

from context_qa.dataset import GroupedSampler, Pairing, continuation
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.training import Continuation
from squad_utils import NO_ANSWER, PROMPT_ORDERS, Example, prompt_parts

ROOT = Path(__file__).parents[2]
CAT = Example("cat", "Bo is a cat.", "What is Bo?", ("a cat", "cat"))
UNKNOWN = Example("unknown", "Bo is a cat.", "How old is Bo?", ())

# Five contexts with one to three questions each, those of a context not in a row.
EXAMPLES = [
    Example(f"{context}-{number}", f"Person {context} has number {context}7.", "Which?", answers)
    for number, contexts in enumerate(("abcde", "bcd", "d"))
    for context in contexts
    for answers in [() if (context, number) == ("c", 1) else (f"{context}7",)]
]


class WholeTextTokenizer:
    """Makes a token of the whole text, and a first one if special tokens are not declined."""

    eos_token_id = "<eos>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": ["<bos>", text] if add_special_tokens else [text]}


def pairings(examples, negatives=None, seed=0, epoch=0) -> list[Pairing]:
    sampler = GroupedSampler(examples, negatives, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_parts_are_tokenised_apart_and_end_of_text_is_appended(order):
    prefix, suffix = prompt_parts(CAT.context, CAT.question, order)
    example = continuation(Pairing(CAT, CAT.context), WholeTextTokenizer(), order)
    assert example == Continuation([prefix], [suffix], [" a cat", "<eos>"])


def test_target_is_no_answer_on_other_contexts_and_where_there_is_none():
    def target(example: Example, context: str) -> object:
        return continuation(
            Pairing(example, context), WholeTextTokenizer(), PROMPT_ORDERS[0]
        ).target[0]

    assert target(CAT, CAT.context) == " a cat"
    assert target(CAT, "Cy is a dog.") == f" {NO_ANSWER}"
    assert target(UNKNOWN, UNKNOWN.context) == f" {NO_ANSWER}"


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_ids_of_the_demo_tokenizer_read_back_as_the_prompt(order):
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    prefix, prompt, target = (
        getattr(continuation(Pairing(CAT, CAT.context), tokenizer, order), part)
        for part in ("prefix", "prompt", "target")
    )
    assert tokenizer.decode(prefix + prompt + target[:-1]) == (
        "".join(prompt_parts(CAT.context, CAT.question, order)) + " a cat"
    )
    assert target[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prefix + prompt + target[:-1]


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


def test_each_answerable_question_gets_one_negative_and_an_unanswerable_none():
    for epoch in range(3):
        others = [
            p for p in pairings(EXAMPLES, "random", 0, epoch) if p.context != p.example.context
        ]
        answerable = [e for e in EXAMPLES if e.is_answerable]
        assert sorted(p.example.id for p in others) == sorted(e.id for e in answerable)
        assert len(answerable) == len(EXAMPLES) - 1
        assert all(p.target == NO_ANSWER for p in others)


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
    sampler = GroupedSampler(EXAMPLES, "random", seed=3)
    first = list(sampler)
    assert list(sampler) == first == pairings(EXAMPLES, "random", 3)
    sampler.set_epoch(1)
    assert list(sampler) == pairings(EXAMPLES, "random", 3, epoch=1) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert pairings(EXAMPLES, None, 3) != pairings(EXAMPLES, None, 4)


def test_length_counts_what_comes_even_where_no_context_is_fit():
    everywhere = replace(EXAMPLES[0], id="everywhere", answers=("number",))  # in all contexts
    for examples, negatives, expected in (
        (EXAMPLES, None, 9),
        (EXAMPLES, "random", 9 + 8),
        ([*EXAMPLES, everywhere], "random", 10 + 8),
        ([CAT], "random", 1),
    ):
        sampler = GroupedSampler(examples, negatives)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            assert len(sampler) == len(list(sampler)) == expected
