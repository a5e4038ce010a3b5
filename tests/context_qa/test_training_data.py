"""Examples that are too long are cut around their answer; the report counts what is read."""

import random
import re
from pathlib import Path

import pytest

from context_qa.dataset import GroupedBatches, continuation
from context_qa.training_data import data_report, within_length
from errors import UserError
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.prefix_suffix import collate
from squad_utils import PROMPT_ORDERS, Example

ROOT = Path(__file__).parents[2]
ORDERS = PROMPT_ORDERS[:3]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "data/demo/tokenizer"))


def make_examples(count: int = 60, seed: int = 0) -> list[Example]:
    """Contexts of 5 to 200 words, one of them the answer; every fifth has none."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        words = [f"word{rng.randrange(999)}" for _ in range(rng.randint(5, 200))]
        place = rng.randrange(len(words))
        words[place] = f"answer{number}"
        answers = () if number % 5 == 0 else (f"answer{number}",)
        examples.append(Example(f"id{number}", " ".join(words), f"Which, {number}?", answers))
    return examples


def length(example: Example, tokenizer, order: str) -> int:
    [batch] = GroupedBatches([example], 1)
    parts = continuation(batch[0], tokenizer, order)
    return len(parts.prefix) + len(parts.prompt) + len(parts.target)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_length", [60, 150])
def test_what_is_too_long_keeps_its_answer_and_as_much_as_fits(max_length, order, tokenizer):
    examples = make_examples()
    found = within_length(examples, tokenizer, order, max_length)
    by_id = {example.id: example for example in found.examples}
    cut = 0
    for example in examples:
        kept = by_id[example.id]
        assert length(kept, tokenizer, order) <= max_length
        assert kept.context in example.context and kept.target in (kept.context, kept.target)
        if kept.answers:
            assert kept.answers[0] in kept.context.split()
        if kept.context != example.context:
            cut += 1
            assert length(example, tokenizer, order) + 9 > max_length
            # With a word more it would not fit, a word being of a few tokens, read twice at most.
            assert length(kept, tokenizer, order) + 24 > max_length
    assert (cut, 0) == (found.num_cut, found.num_dropped) and cut > 10


def test_the_answer_stands_anywhere_in_what_is_kept(tokenizer):
    """Or a model would learn to look at the middle."""
    found = within_length(make_examples(200), tokenizer, ORDERS[0], 100)
    places = []
    for example in found.examples:
        words = example.context.split()
        if example.answers and len(words) > 8:
            places.append(words.index(example.answers[0]) / (len(words) - 1))
    assert sum(place < 0.25 for place in places) > len(places) / 8
    assert sum(place > 0.75 for place in places) > len(places) / 8


def test_the_answer_is_not_looked_for_inside_of_other_words(tokenizer):
    """If it stands by itself anywhere; in other scripts it may not."""
    filler = "and so it went on and on for a very long time " * 10
    examples = [
        Example("Ann", f"Anna Bell moved in. {filler} The mayor was Ann.", "Who?", ("Ann",)),
        Example("10", f"In 1066 it began. {filler} It has 10 rooms.", "How many?", ("10",)),
        Example("part", f"Unbelievable. {filler}", "What?", ("believ",)),
    ]
    found = within_length(examples, tokenizer, ORDERS[0], 60).examples
    wanted = ("was Ann.", "10 rooms", "Unbelievable.")
    for example, words in zip(found, wanted, strict=True):
        assert words in example.context and len(example.context) < 200


def test_what_cannot_be_cut_is_dropped(tokenizer):
    context = "Some words of a passage that is too long. " * 20
    examples = [
        Example("not there", context, "What?", ("else",)),
        Example("long question", context, "What? " * 99, ("words",)),
        Example("long answer", context, "What?", (context.strip(),)),
        Example("fits", context, "What?", ("words",)),
    ]
    found = within_length(examples, tokenizer, ORDERS[0], 90)
    assert [example.id for example in found.examples] == ["fits"]
    assert (found.num_cut, found.num_dropped) == (1, 3)
    with pytest.raises(UserError, match="--max_length 9: too short for every example"):
        within_length(examples, tokenizer, ORDERS[0], 9)


def test_without_a_limit_all_stays(tokenizer):
    examples = make_examples()
    assert within_length(examples, tokenizer, ORDERS[0], None) == (examples, 0, 0)


@pytest.mark.parametrize("order", ORDERS)
def test_no_batch_holds_what_is_longer(order, tokenizer):
    """Nor where a question is asked on another context, that was cut for another question."""
    found = within_length(make_examples(), tokenizer, order, 60)
    for batch in GroupedBatches(found.examples, 16, "random"):
        for pairing in batch:
            parts = continuation(pairing, tokenizer, order, max_length=60)
            assert len(parts.prefix) + len(parts.prompt) + len(parts.target) <= 60


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_length", [None, 60])
def test_the_report_counts_what_batches_hold(max_length, order, tokenizer):
    examples = make_examples()
    data = within_length(examples, tokenizer, order, max_length)
    batches = GroupedBatches(data.examples, 16, "random")
    report = data_report(data, batches, tokenizer, order, max_length)
    tokens = loss_tokens = longest = 0
    for pairings in batches:
        parts = [continuation(pairing, tokenizer, order, max_length) for pairing in pairings]
        batch = collate(parts)
        tokens += int(batch["prefix_lengths"].sum() + batch["suffix_lengths"].sum())
        loss_tokens += int((batch["labels"] >= 0).sum())
        lengths = [len(p.prefix) + len(p.prompt) + len(p.target) for p in parts]
        longest = max(longest, *lengths)
    assert (report.tokens, report.loss_tokens, report.longest) == (tokens, loss_tokens, longest)
    assert (report.questions, report.answerable, report.negatives) == (60, 48, 36)
    assert report.contexts == len({example.context for example in data.examples})
    first, second, *third = str(report).splitlines()
    assert first.startswith("data: 60 questions, 48 of them answerable, on ")
    assert re.match(rf"an epoch: 96 examples, 36 of them negatives; {tokens:,} tokens", second)
    assert third == ([f"too long: {data.num_cut} cut around the answer, 0 dropped"]
                     if max_length else [])  # fmt: skip
