"""Conversations: what is piped in and typed, commands, Ctrl-C and the end."""

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
    """Let a console hear what is typed, on CONTEXT or what comes first."""

    def run(console: Console, typed: str, context=CONTEXT, is_interactive=True, **settings) -> None:
        type_in(typed, is_interactive)
        Conversation(console, "tests", **settings).run(context)

    return run


def test_a_piped_context_ends_at_an_empty_line_and_questions_follow(answerer, converse, capsys):
    console = Console(answerer, as_json=True)
    text = "Bo is a cat.\nAnn too.\n\nWho is Bo?\n\n  Who is Ann?  \n/help"
    converse(console, text, None, is_interactive=False)
    assert console.passage.text == "Bo is a cat.\nAnn too."
    out, err = capsys.readouterr()
    questions = [json.loads(line)["question"] for line in out.splitlines()]
    assert questions == ["Who is Bo?", "Who is Ann?", "/help"]
    assert err.startswith("Context, ended by an empty line:\nread ") and err.count("\n") == 2


def test_a_piped_context_may_end_with_the_input(answerer, converse, capsys):
    console = Console(answerer)
    converse(console, "Bo is a cat.", None, is_interactive=False)
    assert console.passage.text == "Bo is a cat." and capsys.readouterr().out == ""


@pytest.mark.parametrize("piped", ["", "\n", "  \n\nWho is Bo?\n"])
def test_no_piped_context(answerer, converse, piped):
    with pytest.raises(UserError, match="standard input: the context is empty"):
        converse(Console(answerer), piped, None, is_interactive=False)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # those of Python's stdin
@pytest.mark.parametrize("context", [None, CONTEXT], ids=["context", "question"])
def test_input_that_is_not_utf8_is_told(answerer, monkeypatch, errors, context):
    stream = io.TextIOWrapper(io.BytesIO(b"M\xe9xico\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stream)
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        Conversation(Console(answerer), "tests").run(context)


def test_questions_that_are_given_are_all_that_is_asked(answerer, type_in, capsys):
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

    conversation.lines.question = question
    conversation.run(CONTEXT)
    assert printed == [0, 1, 1]


def test_a_conversation_at_a_terminal(answerer, spoken, converse, capsys, tmp_path):
    other = tmp_path / "other context.txt"
    other.write_text("Cy is a dog.")
    typed = [
        *("Who?", "", "/stats", "/help", "/nothing", "/context", "Dee is", "a bird.", "", "/show"),
        *("Who?", f"/context '{other}'", "/show", "/context missing.txt", "/context", "", "/show"),
        "/context -",
    ]
    converse(Console(answerer), "\n".join(typed) + "\n")
    out, err = capsys.readouterr()
    said = [spoken(context, "Who?").text for context in (CONTEXT, "Dee is\na bird.")]
    assert [line.split("   ")[0] for line in out.splitlines()] == [f"A: {text}" for text in said]
    err = err.replace("Q: ", "")
    assert "time to first token: 0." in err and "(confidence" not in err
    assert "/context [FILE]   read another context" in err
    assert "error: /nothing: no such command; /help lists them\n" in err
    assert "\nDee is\na bird.\n" in err
    assert err.count("Cy is a dog.\n") == 2, "what could not be read leaves the context as it was"
    assert "error: missing.txt: cannot be read (No such file" in err
    assert "error: standard input: the context is empty" in err
    assert "error: /context -: /context alone asks for one" in err


def test_stats(answerer, converse, capsys):
    console = Console(answerer)
    converse(console, "/stats\n")
    assert "tokens/s)\nstate: 2 kB\nQ: " in capsys.readouterr().err
    console.read(CONTEXT)
    console.ask("Why?")
    console.passage = console.passage._replace(seconds=1000.0)
    console.read = lambda context: None
    converse(console, "/stats\n")
    err = capsys.readouterr().err
    assert "read in 1000.00 s (0 tokens/s)" in err and "with the context: 1000.0" in err
    assert f"last answer: {console.last.num_new_tokens} tokens, " in err


def test_a_console_of_shots_loads_no_context(answerer, converse, capsys):
    converse(Console(answerer), "/context\n/show\n", loads_contexts=False)
    err = capsys.readouterr().err
    assert "/context: no such command" in err and f"Q: {CONTEXT}\n" in err
    assert "Commands: /show, /stats, /help." in err


@pytest.mark.parametrize("typed", ["", "Bo"])
def test_a_terminals_end_of_input_ends_the_console(answerer, converse, capsys, typed):
    converse(Console(answerer), typed, None)
    assert capsys.readouterr().out == ""


def test_ctrl_c_stops_an_answer_at_a_terminal_and_else_the_script(
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


def test_ctrl_c_while_another_context_is_read_leaves_the_one_before(
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
    assert console.passage.text == CONTEXT and answerer.model.is_plain()
