"""The console: what is read, asked and told; commands; contexts from files and pipes."""

import argparse
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from context_qa.answering import Answerer
from context_qa.console import Console, add_console_flags, load_console, read_context
from context_qa.terminal import Lines
from errors import UserError
from mamba_lm.checkpoint import NOTE, load_tokenizer, save_model
from mamba_lm.delta import LAYERS
from mamba_lm.model import MambaConfig, MambaLM
from mamba_lm.streaming import Sampler
from squad_utils import prompt_parts

ROOT = Path(__file__).parents[2]
CONTEXT = "Bo is a “cat”. Ann too."
FIELDS = [
    *("question", "answer", "confidence", "no_answer_probability", "time", "time_to_first_token"),
    *("num_tokens", "num_new_tokens", "tokens_per_sec"),
]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    config = MambaConfig(len(tokenizer), d_model=16, n_layer=2, d_state=4)
    answerer = Answerer(MambaLM(config).eval(), tokenizer, max_new_tokens=4)
    answerer.read_prefixes(["which backend runs is said once"])
    return answerer


@pytest.fixture
def type_in(monkeypatch):
    """Make this text standard input, typed at a terminal or not; the lines of it."""

    def use(text: str, screen=None, is_interactive: bool = False) -> Lines:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: is_interactive)
        return Lines(screen)

    return use


def spoken(answerer: Answerer, context: str, question: str):
    """What a fresh reading answers."""
    [answers] = answerer.answer([prompt_parts(context, question)])
    return answers[0]


# Contexts from files and pipes


def test_a_context_from_a_file_without_blanks_around_it(tmp_path, monkeypatch):
    path = tmp_path / "context.txt"
    path.write_bytes("\ufeff\n\nBo is a “cat”.\r\n\r\nAnn too.\n".encode())
    assert read_context(str(path)) == "Bo is a “cat”.\n\nAnn too."
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_context("~/context.txt").startswith("Bo")


def test_a_context_that_is_all_of_standard_input(type_in):
    type_in("\nBo is a cat.\n\nAnn too.\n")
    assert read_context("-") == "Bo is a cat.\n\nAnn too."
    type_in(" \n")
    with pytest.raises(UserError, match="standard input: the context is empty"):
        read_context("-")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b" \n\t\n", "the context is empty"),
        (b"", "the context is empty"),
        (b"Bo\nM\xe9xico", "line 2: not UTF-8"),
    ],
)
def test_a_file_without_a_context(tmp_path, content, complaint):
    path = tmp_path / "context.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_context(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_piped_context_ends_at_an_empty_line_and_questions_follow(answerer, type_in, capsys):
    console = Console(answerer, as_json=True)
    text = "Bo is a cat.\nAnn too.\n\nWho is Bo?\n\n  Who is Ann?  \n/help"
    console.run(type_in(text, console.screen))
    assert console.passage.text == "Bo is a cat.\nAnn too."
    out, err = capsys.readouterr()
    questions = [json.loads(line)["question"] for line in out.splitlines()]
    assert questions == ["Who is Bo?", "Who is Ann?", "/help"]
    assert err.startswith("Context, ended by an empty line:\nread ") and err.count("\n") == 2


def test_a_piped_context_may_end_with_the_input(answerer, type_in, capsys):
    console = Console(answerer)
    console.run(type_in("Bo is a cat.", console.screen))
    assert console.passage.text == "Bo is a cat." and capsys.readouterr().out == ""


@pytest.mark.parametrize("piped", ["", "\n", "  \n\nWho is Bo?\n"])
def test_no_piped_context(answerer, type_in, piped):
    console = Console(answerer)
    with pytest.raises(UserError, match="standard input: the context is empty"):
        console.run(type_in(piped, console.screen))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # those of Python's stdin
def test_input_that_is_not_utf8_is_told(answerer, monkeypatch, errors):
    def pipe_in(data: bytes) -> Lines:
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stream)
        return Lines(Console(answerer).screen)

    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        pipe_in(b"M\xe9xico\n\nWho?\n").context()
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        pipe_in(b"M\xe9xico?\n").question()
    pipe_in(b"M\xe9xico")
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
        read_context("-")


# Answers


def test_answers_are_those_of_fresh_readings(answerer, capsys):
    """Each question is asked from the state after the context, whatever was asked before."""
    questions = ["Who is “Bo”?", "Why?", "Who is “Bo”?"]
    console = Console(answerer, as_json=True)
    console.read(CONTEXT)
    for question in questions:
        console.ask(question)
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert "“Bo”" in out and records[0]["answer"] != records[1]["answer"]
    for question, record in zip(questions, records, strict=True):
        expected = spoken(answerer, CONTEXT, question)
        assert list(record) == FIELDS
        assert (record["question"], record["answer"]) == (question, expected.text)
        assert record["confidence"] == pytest.approx(expected.confidence, rel=1e-4, abs=0)
        assert record["no_answer_probability"] == pytest.approx(
            expected.no_answer_probability, rel=1e-4, abs=0
        )
        assert record["num_tokens"] == expected.num_tokens
        assert record["num_new_tokens"] == expected.num_new_tokens
        assert 0 < record["time_to_first_token"] < record["time"]
        assert record["tokens_per_sec"] == record["num_new_tokens"] / record["time"]
    length = len(answerer.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"])
    assert err.startswith(f"read {length} tokens in 0.") and err.count("\n") == 1


def test_the_first_question_bears_the_time_of_reading(answerer, capsys):
    console = Console(answerer, as_json=True)
    console.read(CONTEXT)
    console.passage = console.passage._replace(seconds=1000.0)
    for _ in range(2):
        console.ask("Why?")
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for name in ("time", "time_to_first_token"):
        assert first[name] > 1000 > 100 > second[name]
    console._stats()
    err = capsys.readouterr().err
    assert "read in 1000.00 s" in err and "as for the first answer: 1000.0" in err


def test_answers_as_text_are_a_line_each(answerer, capsys):
    console = Console(answerer)
    console.read(CONTEXT)
    for question in ("Who?", "Why?"):
        console.ask(question)
    lines = capsys.readouterr().out.splitlines()
    for line, question in zip(lines, ("Who?", "Why?"), strict=True):
        expected = spoken(answerer, CONTEXT, question).text
        assert line == f"{expected}   (confidence 0.00, no answer 0.00)"


def test_an_abstention_tells_how_likely_an_answer_was(answerer, capsys, monkeypatch):
    console = Console(answerer, lambda log_probs: next(tokens))
    console.read(CONTEXT)
    said = [*answerer.no_answer_ids, answerer.tokenizer.eos_token_id]
    monkeypatch.setattr(answerer, "max_new_tokens", len(said))
    tokens = iter(said)
    console.ask("Why?")
    assert capsys.readouterr().out == "I don't know.   (confidence 0.00, an answer 1.00)\n"


def test_each_answer_is_printed_before_the_next_question_is_read(answerer, type_in, capsys):
    console = Console(answerer, as_json=True)
    lines, printed = type_in(""), []

    def question() -> str:
        printed.append(capsys.readouterr().out.count("\n"))
        if len(printed) == 3:
            raise EOFError
        return "Why?"

    lines.question = question
    console.run(lines, CONTEXT)
    assert printed == [0, 1, 1]


def test_draws_follow_the_seed(answerer, capsys):
    def draw(seed: int) -> str:
        console = Console(answerer, Sampler(2.0, seed=seed))
        console.read(CONTEXT)
        console.ask("Why?")
        return capsys.readouterr().out

    assert draw(1) == draw(1) != draw(2)


def test_what_is_sent_is_shown_on_standard_error(answerer, capsys):
    console = Console(answerer, as_json=True, show_prompt=True)
    console.read(CONTEXT)
    console.ask("Why?")
    out, err = capsys.readouterr()
    assert json.loads(out)["question"] == "Why?"
    shown = [line for line in err.split("\n") if not line.startswith("read ")]
    assert "\n".join(shown) == f"{CONTEXT}\n\n\nQ: Why?\nA:\n"


def test_explanations(answerer, capsys):
    norms = {}
    for layers in ([0], [1], [0, 1]):
        console = Console(answerer, as_json=True, layers=layers)
        console.read(CONTEXT)
        console.ask("Why?")
        record = json.loads(capsys.readouterr().out)
        assert list(record) == [*FIELDS, "spans", "delta"] and record["spans"] == []
        starts, ends, norms[tuple(layers)] = zip(*record["delta"], strict=True)
        assert (starts[0], ends[-1]) == (0, len(CONTEXT))
        assert record["answer"] == spoken(answerer, CONTEXT, "Why?").text
    means = [(one + other) / 2 for one, other in zip(norms[0,], norms[1,], strict=True)]
    assert norms[0, 1] == pytest.approx(means) and norms[0,] != pytest.approx(norms[1,])

    tokens = iter([*answerer.tokenizer(" Ann")["input_ids"], answerer.tokenizer.eos_token_id])
    console = Console(answerer, lambda log_probs: next(tokens), layers=[0])
    console.read(CONTEXT)
    console.ask("Who?")
    answer, text, shades, legend = capsys.readouterr().out.splitlines()
    assert answer.startswith("Ann   (") and text == "Bo is a “cat”. [Ann] too."
    assert set(shades) <= set(" ░▒▓█") and legend.endswith("; the answer: marked)")


# Conversations


def converse(console: Console, lines: Lines) -> None:
    console.run(lines, CONTEXT)


def test_a_conversation_at_a_terminal(answerer, type_in, capsys, tmp_path):
    other = tmp_path / "other context.txt"
    other.write_text("Cy is a dog.")
    typed = [
        *("Who?", "", "/stats", "/help", "/nothing", "/context", "Dee is", "a bird.", "", "/show"),
        *("Who?", f"/context {other}", "/show", "/context missing.txt", "/context", "", "/show"),
    ]
    console = Console(answerer)
    converse(console, type_in("\n".join(typed) + "\n", console.screen, is_interactive=True))
    out, err = capsys.readouterr()
    said = [spoken(answerer, context, "Who?").text for context in (CONTEXT, "Dee is\na bird.")]
    assert [line.split("   ")[0] for line in out.splitlines()] == [f"A: {text}" for text in said]
    err = err.replace("Q: ", "")
    assert "time to first token: 0." in err and "(confidence" not in err
    assert "/context [FILE]   read another context" in err
    assert "/nothing: no such command; /help lists them\n" in err
    assert "\nDee is\na bird.\n" in err
    assert err.count("Cy is a dog.\n") == 2, "what could not be read leaves the context as it was"
    assert "error: missing.txt: cannot be read (No such file" in err
    assert "error: standard input: the context is empty" in err


def test_stats_before_any_question(answerer, type_in, capsys):
    console = Console(answerer)
    converse(console, type_in("/stats\n", console.screen, is_interactive=True))
    assert "tokens/s)\nstate: 2 kB\n" in capsys.readouterr().err


def test_a_console_of_shots_loads_no_context(answerer, type_in, capsys):
    console = Console(answerer, loads_contexts=False)
    converse(console, type_in("/context\n/show\n", console.screen, is_interactive=True))
    err = capsys.readouterr().err
    assert "/context: no such command" in err and f"Q: {CONTEXT}\n" in err
    assert "Commands: /show, /stats, /help." in err


@pytest.mark.parametrize("typed", ["", "Bo"])
def test_a_terminals_end_of_input_ends_the_console(answerer, type_in, capsys, typed):
    console = Console(answerer)
    console.run(type_in(typed, console.screen, is_interactive=True))
    assert capsys.readouterr().out == ""


def test_ctrl_c_stops_an_answer_at_a_terminal_and_else_the_script(answerer, type_in, capsys):
    def interrupting(log_probs):
        raise KeyboardInterrupt

    console = Console(answerer, interrupting)
    converse(console, type_in("Who?\nWhy?\n", console.screen, is_interactive=True))
    out, err = capsys.readouterr()
    assert out == 2 * "A:  ...\n" and err.count("stopped; Ctrl-D ends\n") == 2
    with pytest.raises(KeyboardInterrupt):
        converse(console, type_in("Who?\n", console.screen))


def test_ctrl_c_while_another_context_is_read_leaves_the_one_before(answerer, type_in, monkeypatch):
    console = Console(answerer, layers=[0])
    console.read(CONTEXT)

    def interrupting(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(answerer, "read_prefixes", interrupting)
    lines = type_in("/context\nCy is a dog.\n\n", console.screen, is_interactive=True)
    with pytest.raises(EOFError):
        console.converse(lines)
    assert console.passage.text == CONTEXT and answerer.model.is_plain()


# From the command line


@pytest.fixture
def arguments(answerer, tmp_path):
    """Arguments with a saved model, as the command line gives them."""
    folder = tmp_path / "model"
    save_model(answerer.model, folder, answerer.tokenizer)

    def parse(*flags: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        parser.add_argument("model")
        add_console_flags(parser)
        return parser.parse_args([str(folder), "--device", "cpu", *flags])

    return parse


def test_a_console_as_the_command_line_says(arguments, capsys):
    console = load_console(arguments("--max_new_tokens", "3"))
    assert console.answerer.max_new_tokens == 3
    assert (console.as_json, console.layers, console.show_prompt) == (False, (), False)
    args = arguments("--json", "--temperature", "0.5", "--top_k", "7", "--top_p", "0.5")
    args.show_prompt = True
    console = load_console(args, explain=True, loads_contexts=False)
    assert console.as_json and console.show_prompt and console.layers == [0, 1]
    assert "/context" not in console.commands
    assert capsys.readouterr().out == ""


def test_the_layers_that_explain_are_those_that_the_folder_names(arguments):
    args = arguments()
    (Path(args.model) / LAYERS).write_text("[1]")
    assert load_console(args, explain=True).layers == [1]
    assert load_console(args).layers == ()


def test_a_models_note_goes_to_stderr(arguments, capsys):
    args = arguments()
    (Path(args.model) / NOTE).write_bytes(b"Made for tests\xe9\n")
    load_console(args)
    assert capsys.readouterr() == ("", "Made for tests\ufffd\n")


def test_a_model_that_learnt_another_prompt_is_told(arguments, capsys):
    args = arguments()
    record = {"arguments": {"prompt_order": "read_twice"}}
    (Path(args.model) / "training_args.json").write_text(json.dumps(record))
    load_console(args)
    assert "was trained with --prompt_order read_twice; here the context comes first" in (
        capsys.readouterr().err
    )
    load_console(args, loads_contexts=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--question", " "], "--question: is empty"),
        (["--question", "Who?", "--question", ""], "--question: is empty"),
        (["--question", "M\udce9xico?"], "--question: .*UTF-8"),
        (["--top_k", "3"], "give a --temperature"),
        (["--top_p", "0.5"], "give a --temperature"),
    ],
)
def test_bad_flags_are_told_before_a_model_is_loaded(arguments, flags, complaint):
    args = arguments(*flags)
    args.model = "no such model"
    with pytest.raises(UserError, match=complaint):
        load_console(args)


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "-1"],
        ["--temperature", "inf"],
        ["--temperature", "nan"],
        ["--top_k", "0"],
        ["--top_p", "1.5"],
        ["--seed", "-1"],
        ["--max_new_tokens", "0"],
    ],
)
def test_impossible_numbers_are_refused(arguments, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        arguments(*flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err
