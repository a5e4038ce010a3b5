"""Reading practice from plain text: what recurs is masked in one place, asked for, and findable."""

import random
import sys

import pytest

from common.errors import UserError
from data import make_recall
from data.make_recall import BLANK, QUESTIONS, questions, recurring_spans, without_marks
from squad_utils import normalize_answer, read_examples

PASSAGE = (
    "The town of Old Harbour lies on the river Senn. In 1821, a fire took half of it. The mayor, "
    "Anna Bell, had Old Harbour rebuilt in stone. Since 1821 the Senn has had three bridges; the "
    "oldest of them is called after Anna Bell. Nobody who lives there has ever crossed all of them "
    "on one day."
)


def make(passage: str = PASSAGE, seed: int = 0):
    return questions(passage, random.Random(seed))


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["make_recall", *map(str, arguments)])
    make_recall.main(make_recall.parse_args())


def test_names_and_numbers_that_recur_are_found():
    found = {PASSAGE[slice(*places[0])] for places in recurring_spans(PASSAGE)}
    assert found == {"Old Harbour", "Senn", "1821", "Anna Bell"}
    assert not recurring_spans("The dog saw a cat. The cat saw it too. A 3 and one 4.")


def test_nothing_inside_of_a_word_is_found():
    assert not recurring_spans("the bfloat16 and int16 of iPhone and MyPhone, the 3rd and 3D")


@pytest.mark.parametrize("seed", range(20))
def test_each_question_is_a_sentence_with_a_blank_whose_answer_stands_elsewhere(seed):
    asked = make(seed=seed)
    assert 2 <= len(asked) <= 4
    [context] = {example.context for example in asked}
    assert context.count(BLANK) == len(asked)
    whole = context
    for example in asked:
        assert example.question.count(BLANK) == 1
        assert normalize_answer(example.answers[0]) in normalize_answer(context)
        assert example.question in context, "masked there too"
        whole = whole.replace(BLANK, example.answers[0], 1)
    assert whole == PASSAGE


def test_a_passage_has_at_most_five_questions_and_each_sentence_one_blank():
    names = [f"Name{letter}x" for letter in "ABCDEFGH"]
    passage = " ".join(f"What the {n}th sees, {name} sees." for n, name in enumerate(names * 2))
    asked = make(passage)
    assert len(asked) == QUESTIONS
    assert len({example.question for example in asked}) == QUESTIONS


@pytest.mark.parametrize("passage", ["", "= Title of 1821 =", "Anna met Anna.", "word " * 100])
def test_some_passages_have_none(passage):
    assert make(passage) == []


def test_long_sentences_are_cut_around_the_blank():
    passage = f"In {'a ' * 40}Old Harbour {'b ' * 40}end. It is Old Harbour."
    [example] = make(passage)
    assert len(example.question.split()) <= make_recall.QUESTION_WORDS + 1


@pytest.mark.parametrize(
    "line, written",
    [
        (' the " Nameless " , a penal unit \n', 'the "Nameless", a penal unit'),
        ("13 @,@ 500 km at 2 @.@ 5 % of real @-@ time", "13,500 km at 2.5% of real-time"),
        ("the game 's theme ( 1988 ) isn 't", "the game's theme (1988) isn't"),
    ],
)
def test_the_marks_of_wikitext_are_taken_out(line, written):
    assert without_marks(line) == written


def test_the_file_reads_as_examples(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(f"\n = Title = \n{PASSAGE}\n\n{PASSAGE}\n", encoding="utf-8")
    run(monkeypatch, text, tmp_path / "a.jsonl")
    run(monkeypatch, text, tmp_path / "b.jsonl", "--seed", 0)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    examples = read_examples(str(tmp_path / "a.jsonl"))
    assert all(example.is_answerable for example in examples)
    said = f"{len(examples)} questions on {len({e.context for e in examples})} passages"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("content, said", [(None, "cannot be read"), (b"\xff", "line 1: not UTF-8"),
                                           (b"nothing recurs", "no paragraph of 40")])  # fmt: skip
def test_bad_input(content, said, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UserError, match=said):
        run(monkeypatch, text, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
