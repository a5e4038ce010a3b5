"""The parts of a report's page: groups of questions, and data that may stand inside of HTML."""

import json
from collections.abc import Sequence

import pytest

from context_qa.results import report
from context_qa.results.rows import Answer, result_row
from squad_utils import Example


def row(question: str = "Who?", answers: Sequence[str] = ("Bo",), num_tokens: int = 40) -> dict:
    example = Example("q", "Bo is here.", question, tuple(answers))
    return result_row(0, example, Answer("Bo", 0.5, 0.5, 0.1, num_tokens, 1))


def sizes(groups: dict[str, list]) -> dict[str, int]:
    return {title: len(rows) for title, rows in groups.items()}


@pytest.mark.parametrize(
    "question, word",
    [
        ("What's in it?", "what"),
        ("Whose is it?", "who"),
        ("In  WHICH year was he told who he was?", "which"),
        ("How\nmany are there, and how much is one?", "how many, how much"),
        ("About how  much is it?", "how many, how much"),
        ("How muchly is it?", "how"),
        ("Tell me when and where.", "when"),
        ("Why?", "why"),
        ("Somewhat whatever, nowhere: name it.", "other"),
    ],
)
def test_question_words(question, word):
    assert sizes(report.by_question_word([row(question)])) == {word: 1}


def test_answer_lengths():
    answers = [(), ("one",), ("one  two", "1"), ("a b c",), ("a b c d",), ("a b c d e",)]
    answers += [("a b c d e f",), ("x " * 10,), ("x " * 11,)]
    assert sizes(report.by_answer_length([row(answers=each) for each in answers])) == {
        "no answer": 1,
        "1 word": 1,
        "2 words": 1,
        "3 words": 1,
        "4 or 5 words": 2,
        "6 to 10 words": 2,
        "over 10 words": 1,
    }


@pytest.mark.parametrize(
    "lengths, groups",
    [
        (
            range(101, 601),
            {
                "up to 200": 100,
                "201 to 300": 100,
                "301 to 400": 100,
                "401 to 500": 100,
                "over 500": 100,
            },
        ),
        ([7], {"up to 7": 1}),
        ([7] * 9 + [5], {"up to 7": 10}),
        ([1200] * 6 + [9000] * 4, {"1,001 to 4,500": 6, "4,501 to 9,000": 4}),
    ],
)
def test_prompt_lengths(lengths, groups):
    found = report.by_prompt_length([row(num_tokens=length) for length in lengths])
    assert sizes(found) == groups


def test_prompt_lengths_are_of_about_equal_size_between_round_bounds():
    lengths = [60 + i * i % 397 for i in range(3000)]
    groups = report.by_prompt_length([row(num_tokens=length) for length in lengths])
    assert len(groups) == 5 and sum(sizes(groups).values()) == 3000
    assert all(500 < size < 700 for size in sizes(groups).values())
    assert all(int(title.split()[-1]) % 10 == 0 for title in groups)


def test_json_inside_of_html_stays_json():
    value = ["</script>", "<!--", "\u2028", 'é"\\', None, True, 0.5]
    text = report.embedded_json(value)
    assert "<" not in text and json.loads(text) == value
    with pytest.raises(ValueError):
        report.embedded_json([float("nan")])
