"""Examples that are too long are cut around their answer; the report counts what is read."""

import json
import random
import re
from pathlib import Path

import pytest

from common.errors import UserError
from context_qa.batches import GroupedBatches, continuation
from context_qa.training.data_report import cut_to_length, make_data_report
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.training.prefix_suffix import collate
from squad_utils import PROMPT_ORDERS, Example, read_examples

ROOT = Path(__file__).parents[3]
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
    return len(parts.prefix) + len(parts.suffix)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_length", [60, 150])
def test_what_is_too_long_keeps_its_answer_and_as_much_as_fits(max_length, order, tokenizer):
    examples = make_examples()
    found = cut_to_length(examples, tokenizer, order, max_length)
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
    found = cut_to_length(make_examples(200), tokenizer, ORDERS[0], 100)
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
    found = cut_to_length(examples, tokenizer, ORDERS[0], 60).examples
    wanted = ("was Ann.", "10 rooms", "Unbelievable.")
    for example, words in zip(found, wanted, strict=True):
        assert words in example.context and len(example.context) < 200


FILLER = "and so it went on and on for a very long time " * 10
LATER = f"It has 10 rooms. {FILLER} The bill of 10 euros was paid in 1066."


def rows(answer: str, start: object) -> dict[str, list[dict]]:
    """One question in each layout that says where its answer is."""
    row = {"id": "x", "context": LATER, "question": "How many?"}
    listed = [{"text": answer, "answer_start": start}]
    pair = {"text": [answer], "answer_start": [start]}
    qas = {"paragraphs": [{"context": LATER, "qas": [row | {"answers": listed}]}]}
    return {
        "listed": [row | {"answers": listed}],
        "hugging face": [row | {"answers": pair}],
        "squad": [{"data": [qas]}],
    }


def read_cut(tmp_path, tokenizer, written: list[dict]):
    path = tmp_path / "data.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    examples = read_examples(str(path))
    found = cut_to_length(examples, tokenizer, ORDERS[0], 60)
    report = make_data_report(found, GroupedBatches(found.examples, 4), tokenizer, ORDERS[0], 60)
    return found.examples[0], str(report)


@pytest.mark.parametrize("layout", ["listed", "hugging face", "squad"])
@pytest.mark.parametrize("answer, wanted", [("10", "10 euros"), ("66", "1066.")])
def test_the_answer_is_kept_where_the_data_says(answer, wanted, layout, tokenizer, tmp_path):
    start = LATER.rindex(wanted) + wanted.index(answer)
    cut, report = read_cut(tmp_path, tokenizer, rows(answer, start)[layout])
    assert wanted in cut.context and "rooms" not in cut.context
    assert cut.context.startswith(answer, cut.answer_start)
    assert "answer_start" not in report


@pytest.mark.parametrize("layout", ["listed", "hugging face", "squad"])
@pytest.mark.parametrize(
    "start, is_told",
    [
        (3, True),
        (-2, True),
        (10**30, True),
        (None, False),
        ("7", False),
        (7.0, False),
        ([7], False),
    ],
)
def test_without_a_right_place_the_first_answer_counts(start, is_told, layout, tokenizer, tmp_path):
    cut, report = read_cut(tmp_path, tokenizer, rows("10", start)[layout])
    assert "10 rooms" in cut.context
    assert ("answer_start is wrong in 1 of the too long ones" in report) == is_told


@pytest.mark.parametrize("starts", [None, 7, [], ["x"], {}])
def test_places_that_are_no_list_are_not_used(starts, tokenizer, tmp_path):
    row = {"context": LATER, "question": "How many?"}
    row["answers"] = {"text": ["10"], "answer_start": starts}
    cut, _ = read_cut(tmp_path, tokenizer, [row])
    assert "10 rooms" in cut.context
    other = {"context": LATER, "prompt": "How many?", "response": "10", "answers": starts}
    assert "10 rooms" in read_cut(tmp_path, tokenizer, [other])[0].context


@pytest.mark.parametrize("name", ["dev-v1.1.json", "train-v1.1.44articles.json"])
def test_no_example_of_squad_loses_the_answer_that_was_annotated(name, tokenizer):
    path = ROOT.parent / "shared/data/squad" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    examples = [e for e in read_examples(str(path)) if e.context.count(e.target) > 1][::3]
    found = cut_to_length(examples, tokenizer, ORDERS[0], 110)
    whole = {example.id: example for example in examples}
    cut = [e for e in found.examples if e.context != whole[e.id].context]
    assert len(cut) > 300 and found.num_misplaced == 0
    for example in cut:
        original = whole[example.id]
        skipped = original.answer_start - example.answer_start
        assert original.context.startswith(example.context, skipped)
        assert example.context.startswith(example.target, example.answer_start)


def test_what_cannot_be_cut_is_dropped(tokenizer):
    context = "Some words of a passage that is too long. " * 20
    examples = [
        Example("not there", context, "What?", ("else",)),
        Example("long question", context, "What? " * 99, ("words",)),
        Example("long answer", context, "What?", (context.strip(),)),
        Example("fits", context, "What?", ("words",)),
    ]
    found = cut_to_length(examples, tokenizer, ORDERS[0], 90)
    assert [example.id for example in found.examples] == ["fits"]
    assert (found.num_cut, found.num_dropped) == (1, 3)
    with pytest.raises(UserError, match="max_length 9 is too short for every example"):
        cut_to_length(examples, tokenizer, ORDERS[0], 9)


def test_without_a_limit_all_stays(tokenizer):
    examples = make_examples()
    assert cut_to_length(examples, tokenizer, ORDERS[0], None) == (examples, 0, 0, 0)


@pytest.mark.parametrize("order", ORDERS)
def test_no_batch_contains_longer_examples(order, tokenizer):
    """Nor where a question is asked on another context, that was cut for another question."""
    found = cut_to_length(make_examples(), tokenizer, order, 60)
    for batch in GroupedBatches(found.examples, 16, "random"):
        for pairing in batch:
            parts = continuation(pairing, tokenizer, order, max_length=60)
            assert len(parts.prefix) + len(parts.suffix) <= 60


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_length", [None, 60])
def test_the_report_counts_what_batches_contain(max_length, order, tokenizer):
    examples = make_examples()
    data = cut_to_length(examples, tokenizer, order, max_length)
    batches = GroupedBatches(data.examples, 16, "random")
    report = make_data_report(data, batches, tokenizer, order, max_length)
    tokens = loss_tokens = longest = 0
    for pairings in batches:
        parts = [continuation(pairing, tokenizer, order, max_length) for pairing in pairings]
        batch = collate(parts)
        tokens += int(batch["prefix_lengths"].sum() + batch["suffix_lengths"].sum())
        loss_tokens += int((batch["labels"] >= 0).sum())
        lengths = [len(p.prefix) + len(p.suffix) for p in parts]
        longest = max(longest, *lengths)
    assert (report.tokens, report.loss_tokens, report.longest) == (tokens, loss_tokens, longest)
    assert (report.questions, report.answerable, report.negatives) == (60, 48, 36)
    assert report.contexts == len({example.context for example in data.examples})
    first, second, *third = str(report).splitlines()
    assert first.startswith("data: 60 questions, 48 of them answerable, on ")
    assert re.match(rf"an epoch: 96 examples, 36 of them negatives; {tokens:,} tokens", second)
    assert third == ([f"too long: {data.num_cut} cut around the answer, 0 dropped"]
                     if max_length else [])  # fmt: skip
