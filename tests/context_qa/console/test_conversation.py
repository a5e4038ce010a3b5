"""Conversations: piped and typed input, commands, Ctrl-C and the end of input."""

import io
import json
import sys

import pytest

from common.errors import UserError
from context_qa.console.console import Console
from context_qa.console.conversation import Conversation

CONTEXT = "Bo is a “cat”. Ann too."


@pytest.fixture
def converse(type_in):
    """Run a conversation on typed input, on CONTEXT or on a context from the input."""

    def run(console: Console, typed: str, context=CONTEXT, is_interactive=True, **settings) -> None:
        type_in(typed, is_interactive)
        Conversation(console, "tests", **settings).run(context)

    return run


def test_a_piped_context_ends_at_an_empty_line_and_questions_follow(answerer, converse, capsys):
    console = Console(answerer, as_json=True)
    text = "Bo is a cat.\nAnn too.\n\nWho is Bo?\n\n  Who is Ann?  \n/help"
    converse(console, text, None, is_interactive=False)
    assert console.context.text == "Bo is a cat.\nAnn too."
    out, err = capsys.readouterr()
    questions = [json.loads(line)["question"] for line in out.splitlines()]
    assert questions == ["Who is Bo?", "Who is Ann?", "/help"]
    assert err.startswith("Context, ended by an empty line:\nread ") and err.count("\n") == 2


def test_a_piped_context_may_end_with_the_input(answerer, converse, capsys):
    console = Console(answerer)
    converse(console, "Bo is a cat.", None, is_interactive=False)
    assert console.context.text == "Bo is a cat." and capsys.readouterr().out == ""


@pytest.mark.parametrize("piped", ["", "\n", "  \n\nWho is Bo?\n"])
def test_no_piped_context_is_an_error(answerer, converse, piped):
    with pytest.raises(UserError, match="standard input: the context is empty"):
        converse(Console(answerer), piped, None, is_interactive=False)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the modes of sys.stdin
@pytest.mark.parametrize("context", [None, CONTEXT], ids=["context", "question"])
def test_input_that_is_not_utf8_is_an_error(answerer, monkeypatch, errors, context):
    stream = io.TextIOWrapper(io.BytesIO(b"M\xe9xico\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stream)
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        Conversation(Console(answerer), "tests").run(context)


def test_given_questions_are_the_only_ones(answerer, type_in, capsys):
    type_in("Who?\n")
    Conversation(Console(answerer, as_json=True), "tests").run(CONTEXT, ["Why?", "Where?"])
    out = capsys.readouterr().out
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["Why?", "Where?"]
    assert sys.stdin.read() == "Who?\n"


def test_each_answer_is_printed_before_the_next_question_is_read(answerer, type_in, capsys):
    type_in("")
    conversation, printed = Conversation(Console(answerer, as_json=True), "tests"), []

    def question() -> str:
        printed.append(capsys.readouterr().out.count("\n"))
        if len(printed) == 3:
            raise EOFError
        return "Why?"

    conversation.input.question = question
    conversation.run(CONTEXT)
    assert printed == [0, 1, 1]


def test_a_conversation_at_a_terminal(answerer, fresh_answer, converse, capsys, tmp_path):
    other = tmp_path / "other context.txt"
    other.write_text("Cy is a dog.")
    typed = [
        *("Who?", "", "/stats", "/help", "/nothing", "/context", "Dee is", "a bird.", "", "/show"),
        *("Who?", f"/context '{other}'", "/show", "/context missing.txt", "/context", "", "/show"),
        "/context -",
    ]
    converse(Console(answerer), "\n".join(typed) + "\n")
    out, err = capsys.readouterr()
    expected = [fresh_answer(context, "Who?").text for context in (CONTEXT, "Dee is\na bird.")]
    assert [line.split("   ")[0] for line in out.splitlines()] == [
        f"A: {text}" for text in expected
    ]
    err = err.replace("Q: ", "")
    assert "time to first token: 0." in err and "(confidence" not in err
    assert "/context [FILE]   read another context" in err
    assert "error: /nothing: unknown command; /help lists all\n" in err
    assert "\nDee is\na bird.\n" in err
    assert err.count("Cy is a dog.\n") == 2, "after a failed read, the context before stays"
    assert "error: missing.txt: cannot be read (No such file" in err
    assert "error: standard input: the context is empty" in err
    assert "error: /context -: to type a context, enter /context alone" in err


def test_stats(answerer, converse, capsys):
    console = Console(answerer)
    converse(console, "/stats\n")
    assert "tokens/s)\nstate: 2 kB\nQ: " in capsys.readouterr().err
    console.read(CONTEXT)
    console.ask("Why?")
    console.context = console.context._replace(seconds=1000.0)
    console.read = lambda context: None
    converse(console, "/stats\n")
    err = capsys.readouterr().err
    assert "read in 1000.00 s (0 tokens/s)" in err and "with the context: 1000.0" in err
    assert f"last answer: {console.last.num_new_tokens} tokens, " in err


def test_the_n_shot_console_has_no_context_command(answerer, converse, capsys):
    converse(Console(answerer), "/context\n/show\n", loads_contexts=False)
    err = capsys.readouterr().err
    assert "/context: unknown command" in err and f"Q: {CONTEXT}\n" in err
    assert "Commands: /show, /stats, /help." in err


@pytest.mark.parametrize("typed", ["", "Bo"])
def test_the_end_of_input_at_a_terminal_ends_the_console(answerer, converse, capsys, typed):
    converse(Console(answerer), typed, None)
    assert capsys.readouterr().out == ""


def test_ctrl_c_stops_an_answer_at_a_terminal_and_the_script_elsewhere(
    answerer, converse, capsys, scripted
):
    def interrupt():
        raise KeyboardInterrupt

    console = Console(answerer, scripted(interrupt))
    converse(console, "Who?\nWhy?\n")
    out, err = capsys.readouterr()
    assert out == 2 * "A:  ...\n" and err.count("stopped; Ctrl-D ends\n") == 2
    with pytest.raises(KeyboardInterrupt):
        converse(console, "Who?\n", is_interactive=False)


def test_ctrl_c_while_another_context_is_read_keeps_the_one_before(
    answerer, converse, capsys, monkeypatch
):
    def interrupting(prefixes, on_read):
        if prefixes != answerer.tokens.encode([CONTEXT]):
            raise KeyboardInterrupt
        return read_prefixes(prefixes, on_read)

    read_prefixes = answerer.read_prefixes
    monkeypatch.setattr(answerer, "read_prefixes", interrupting)
    console = Console(answerer, layers=[0])
    converse(console, "/context\nCy is a dog.\n\n")
    assert "stopped; Ctrl-D ends" in capsys.readouterr().err
    assert console.context.text == CONTEXT and answerer.model.is_plain()
