"""The consoles: context and questions from files, pipes and the keyboard; how answers look."""

import argparse
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from context_qa.answering import Answerer
from context_qa.console import (
    NOTE,
    answer_questions,
    load_answerer,
    one_row,
    read_context,
    typed_questions,
)
from errors import UserError
from mamba_lm.checkpoint import load_tokenizer, save_model
from mamba_lm.model import MambaConfig, MambaLM
from squad_utils import prompt_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    config = MambaConfig(len(tokenizer), d_model=16, n_layer=1, d_state=4)
    return Answerer(MambaLM(config).eval(), tokenizer, max_new_tokens=4)


@pytest.fixture
def type_in(monkeypatch):
    """Make this text standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_context_from_a_file_without_blanks_around_it(tmp_path):
    path = tmp_path / "context.txt"
    path.write_bytes("\n\nBo is a “cat”.\r\n\r\nAnn too.\n".encode())
    assert read_context(str(path)) == "Bo is a “cat”.\n\nAnn too."


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b" \n\t\n", "the context is empty"),
        (b"", "the context is empty"),
        (b"M\xe9xico", "cannot be read"),
    ],
)
def test_a_file_without_a_context(tmp_path, content, complaint):
    path = tmp_path / "context.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_context(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_typed_context_ends_at_an_empty_line_and_questions_follow(type_in, capsys):
    type_in("Bo is a cat.\nAnn too.\n\nWho is Bo?\n\n  Who is Ann?  \n")
    assert read_context(None) == "Bo is a cat.\nAnn too."
    assert list(typed_questions()) == ["Who is Bo?", "Who is Ann?"]
    out, err = capsys.readouterr()
    assert out == "" and err == "Context, ended by an empty line:\n"


def test_a_piped_context_may_end_with_the_input(type_in):
    type_in("Bo is a cat.")
    assert read_context(None) == "Bo is a cat."
    assert list(typed_questions()) == []


@pytest.mark.parametrize("typed", ["", "\n", "  \n\nWho is Bo?\n"])
def test_no_typed_context(type_in, typed):
    type_in(typed)
    with pytest.raises(UserError, match="standard input: the context is empty"):
        read_context(None)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # those of Python's stdin
def test_input_that_is_not_utf8_is_told(monkeypatch, errors):
    def pipe_in(data: bytes) -> None:
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stream)

    pipe_in(b"M\xe9xico\n\nWho?\n")
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        read_context(None)
    pipe_in(b"M\xe9xico?\n")
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        list(typed_questions())


def test_questions_come_as_they_are_typed(type_in, monkeypatch, capsys):
    """None is held back until the input ends, and each is asked for at a terminal."""
    type_in("Who?\nWhy?\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    questions = typed_questions()
    assert next(questions) == "Who?"
    assert sys.stdin.tell() == len("Who?\n")
    assert list(questions) == ["Why?"]
    out, err = capsys.readouterr()
    assert out == "" and err.count("Question (Ctrl-D ends): ") == 3


def ask(answerer: Answerer, context: str, questions: list[str], as_json: bool) -> None:
    state, num_tokens = one_row(answerer, prompt_parts(context, "")[0])
    pairs = ((question, prompt_parts(context, question)[1]) for question in questions)
    answer_questions(answerer, state, num_tokens, pairs, as_json)


def test_answers_are_those_of_the_answering_loop(answerer, capsys):
    """Each question is asked from the state after the context, whatever was asked before."""
    context, questions = "Bo is a cat.", ["Who is “Bo”?", "Why?", "Who is “Bo”?"]
    ask(answerer, context, questions, as_json=True)
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    [expected] = answerer.answer([prompt_parts(context, question) for question in questions])
    for place, (question, record) in enumerate(zip(questions, records, strict=True)):
        assert list(record) == [
            "question",
            "answer",
            "confidence",
            "no_answer_probability",
            "time",
            "num_new_tokens",
        ]
        assert (record["question"], record["answer"]) == (question, expected[place].text)
        assert record["confidence"] == pytest.approx(expected[place].confidence, rel=1e-4, abs=0)
        assert record["no_answer_probability"] == pytest.approx(
            expected[place].no_answer_probability, rel=1e-4, abs=0
        )
        assert record["num_new_tokens"] == expected[place].num_new_tokens
        assert record["time"] > 0
    length = len(answerer.tokenizer(context, add_special_tokens=False)["input_ids"])
    assert "“Bo”" in out and f"read {length} tokens into a state of" in err


def test_answers_as_text_are_a_line_each(answerer, capsys):
    ask(answerer, "Bo is a cat.", ["Who?", "Why?"], as_json=False)
    out, _ = capsys.readouterr()
    [expected] = answerer.answer([prompt_parts("Bo is a cat.", q) for q in ("Who?", "Why?")])
    for line, place in zip(out.splitlines(), range(2), strict=True):
        assert line.startswith(f"{expected[place].text}   (confidence 0.00, no answer 0.00, ")


def test_each_answer_is_printed_before_the_next_question_is_read(answerer, capsys):
    printed = []

    def questions():
        for question in ("Who?", "Why?"):
            printed.append(capsys.readouterr().out.count("\n"))
            yield question, prompt_parts("Bo is a cat.", question)[1]

    answer_questions(answerer, *one_row(answerer, "Bo is a cat."), questions(), as_json=True)
    assert printed == [0, 1]


def test_a_models_note_goes_to_stderr(answerer, tmp_path, capsys):
    folder = tmp_path / "model"
    save_model(answerer.model, folder, answerer.tokenizer)
    args = argparse.Namespace(
        model=str(folder), tokenizer=None, device="cpu", dtype="auto", max_new_tokens=3
    )
    loaded = load_answerer(args)
    assert capsys.readouterr().out == "" and loaded.max_new_tokens == 3
    (folder / NOTE).write_bytes(b"Made for tests\xe9\n")
    load_answerer(args)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Made for tests\ufffd\n")
