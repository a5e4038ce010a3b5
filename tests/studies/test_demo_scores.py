"""The demo's scores: the shipped checkpoint's, the baselines', and swapped contexts."""

import json
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest

from context_qa.answering import Answerer
from data import make_negatives
from mamba_lm.checkpoint import load_model, load_tokenizer
from squad_utils import NO_ANSWER, Example, exact_match, read_examples
from studies.demo_model.make_demo import POOLS
from studies.demo_model.score_demo import DATA, answers, nearest_phrase

ROOT = Path(__file__).parents[2]
NAMES = POOLS["validation"]["title"][:3]
PEOPLE = POOLS["validation"]["person"][:2]
CONTEXT = (
    f"{PEOPLE[0]} owns the {NAMES[0]} Hotel. The {NAMES[1]} Hotel was opened in 1902. "
    f"The manager of the {NAMES[1]} Hotel is {PEOPLE[1]}."
)


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        (NAMES[0], (PEOPLE[0],), PEOPLE[0]),
        (NAMES[1], (PEOPLE[1],), PEOPLE[0]),  # the nearest person to its first mention
        (NAMES[2], (), NO_ANSWER),  # not in the context
    ],
)
def test_nearest_phrase(name, answers, expected):
    example = Example("", CONTEXT, f"Who is the owner of the {name} Hotel?", answers)
    assert nearest_phrase(example, "hotel") == expected


def test_the_shipped_checkpoint_answers_and_abstains():
    model = ROOT / "models/demo"
    answerer = Answerer(load_model(str(model)), load_tokenizer(str(model)), max_new_tokens=16)
    examples = read_examples(str(ROOT / DATA))
    guesses = answers(answerer, [(example.context, example.question) for example in examples])
    right = {True: [], False: []}
    for example, guess in zip(examples, guesses, strict=True):
        right[example.is_answerable].append(exact_match(guess, example.answers))
    assert {key: len(scores) for key, scores in right.items()} == {True: 800, False: 400}
    assert all(mean(scores) >= 0.9 for scores in right.values())


def test_written_negatives_are_unanswerable_and_depend_on_the_seed(tmp_path):
    def rows(prefix, number):
        return [
            {
                "context": f"{prefix} {i} is red.",
                "prompt": f"What is {prefix} {i}?",
                "response": "red",
            }
            for i in range(number)
        ]

    data, others = tmp_path / "data.jsonl", tmp_path / "others.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows("Chair", 20)))
    others.write_text(
        "".join(json.dumps(row | {"context": f"Table {i} is blue."}) + "\n"
                for i, row in enumerate(rows("Table", 20)))
    )  # fmt: skip
    drawn = []
    for seed in (0, 0, 5):
        output = tmp_path / f"negatives{len(drawn)}.jsonl"
        make_negatives.main(
            SimpleNamespace(data=str(data), output=str(output), contexts=str(others), seed=seed)
        )
        examples = read_examples(str(output))
        assert [e.question for e in examples] == [f"What is Chair {i}?" for i in range(20)]
        assert not any(e.is_answerable for e in examples)
        assert all(e.context.startswith("Table") for e in examples)
        drawn.append([e.context for e in examples])
    assert drawn[0] == drawn[1] != drawn[2]
