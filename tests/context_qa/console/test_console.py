"""The console: contexts from files, answers as text and JSON, settings from the command line."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.command_line import Parser
from common.errors import UserError
from context_qa.arguments import add_console_flags, console_values
from context_qa.console.console import Console, ConsoleSettings, load_console
from context_qa.console.terminal import read_context
from mamba_lm.checkpoint import NOTE, save_model
from mamba_lm.choosers import Greedy, Sampler
from mamba_lm.delta import LAYERS

ROOT = Path(__file__).parents[3]
CONTEXT = "Bo is a “cat”. Ann too."
FIELDS = [
    *("question", "answer", "confidence", "no_answer_probability", "time", "time_to_first_token"),
    *("num_tokens", "num_new_tokens", "tokens_per_sec"),
]


# Contexts from files and pipes


def test_a_context_from_a_file_has_no_outer_spaces(tmp_path, monkeypatch):
    path = tmp_path / "context.txt"
    path.write_bytes("\ufeff\n\nBo is a “cat”.\r\n\r\nAnn too.\n".encode())
    assert read_context(str(path)) == "Bo is a “cat”.\n\nAnn too."
    with pytest.raises(UserError, match="~nobody-here/x: cannot be read"):
        read_context("~nobody-here/x")
    with pytest.raises(UserError, match="not a valid path"):
        read_context("a\0b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_context("~/context.txt").startswith("Bo")


def test_a_context_from_all_of_standard_input(type_in):
    type_in("\nBo is a cat.\n\nAnn too.\n")
    assert read_context("-") == "Bo is a cat.\n\nAnn too."
    type_in(" \n")
    with pytest.raises(UserError, match="standard input: the context is empty"):
        read_context("-")


def test_standard_input_is_utf8_in_any_locale(monkeypatch):
    data = "\ufeffBo is a “cat”.".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    assert read_context("-") == "Bo is a “cat”."


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the modes of sys.stdin
def test_standard_input_that_is_not_utf8_is_an_error(monkeypatch, errors):
    stream = io.TextIOWrapper(io.BytesIO(b"M\xe9xico"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stream)
    with pytest.raises(UserError, match=r"standard input: .*UTF-8"):
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
def test_a_file_without_a_context_is_an_error(tmp_path, content, complaint):
    path = tmp_path / "context.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_context(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# Answers


def test_each_answer_equals_one_on_a_context_read_again(answerer, fresh_answer, capsys):
    """Each question is answered from the state after the context, whatever was asked before."""
    questions = ["Who is “Bo”?", "Why?", "Who is “Bo”?"]
    console = Console(answerer, as_json=True)
    console.read(CONTEXT)
    for question in questions:
        console.ask(question)
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert "“Bo”" in out and records[0]["answer"] != records[1]["answer"]
    for question, record in zip(questions, records, strict=True):
        expected = fresh_answer(CONTEXT, question)
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


def test_the_time_of_the_first_question_includes_reading(answerer, capsys):
    console = Console(answerer, as_json=True)
    console.read(CONTEXT)
    console.context = console.context._replace(seconds=1000.0)
    for _ in range(2):
        console.ask("Why?")
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for name in ("time", "time_to_first_token"):
        assert first[name] > 1000 > 100 > second[name]


def test_answers_as_text_are_a_line_each(answerer, fresh_answer, capsys):
    console = Console(answerer)
    console.read(CONTEXT)
    for question in ("Who?", "Why?"):
        console.ask(question)
    lines = capsys.readouterr().out.splitlines()
    for line, question in zip(lines, ("Who?", "Why?"), strict=True):
        expected = fresh_answer(CONTEXT, question).text
        assert line == f"{expected}   (confidence 0.00, no answer 0.00)"


def test_an_abstention_is_printed_with_the_probability_of_an_answer(
    answerer, capsys, monkeypatch, scripted
):
    console = Console(answerer, scripted(lambda: next(tokens)))
    console.read(CONTEXT)
    token_ids = [*answerer.no_answer_ids, answerer.tokenizer.eos_token_id]
    monkeypatch.setattr(answerer, "max_new_tokens", len(token_ids))
    tokens = iter(token_ids)
    console.ask("Why?")
    assert capsys.readouterr().out == "I don't know.   (confidence 0.00, an answer 1.00)\n"


def test_an_empty_answer_is_printed_as_nothing(answerer, capsys, scripted):
    console = Console(answerer, scripted(lambda: answerer.tokenizer.eos_token_id))
    console.read(CONTEXT)
    console.ask("Why?")
    assert capsys.readouterr().out == "(nothing)   (confidence 0.00, no answer 0.00)\n"


def test_samples_depend_on_the_seed(answerer, capsys):
    def sample(seed: int) -> str:
        console = Console(answerer, Sampler(2.0, seed=seed))
        console.read(CONTEXT)
        console.ask("Why?")
        return capsys.readouterr().out

    assert sample(1) == sample(1) != sample(2)


def test_show_prompt_prints_what_the_model_reads_on_standard_error(answerer, capsys):
    console = Console(answerer, as_json=True, show_prompt=True)
    console.read(CONTEXT)
    console.ask("Why?")
    out, err = capsys.readouterr()
    assert json.loads(out)["question"] == "Why?"
    printed = [line for line in err.split("\n") if not line.startswith("read ")]
    assert "\n".join(printed) == f"{CONTEXT}\n\n\nQ: Why?\nA:\n"


def test_explanations(answerer, fresh_answer, capsys, scripted):
    norms = {}
    for layers in ([0], [1], [0, 1]):
        console = Console(answerer, as_json=True, layers=layers)
        console.read(CONTEXT)
        console.ask("Why?")
        record = json.loads(capsys.readouterr().out)
        assert list(record) == [*FIELDS, "spans", "delta"] and record["spans"] == []
        starts, ends, norms[tuple(layers)] = zip(*record["delta"], strict=True)
        assert (starts[0], ends[-1]) == (0, len(CONTEXT))
        assert record["answer"] == fresh_answer(CONTEXT, "Why?").text
    means = [(one + other) / 2 for one, other in zip(norms[0,], norms[1,], strict=True)]
    assert norms[0, 1] == pytest.approx(means) and norms[0,] != pytest.approx(norms[1,])

    tokens = iter([*answerer.tokenizer(" Ann")["input_ids"], answerer.tokenizer.eos_token_id])
    console = Console(answerer, scripted(lambda: next(tokens)), layers=[0])
    console.read(CONTEXT)
    console.ask("Who?")
    answer, text, shades, legend = capsys.readouterr().out.splitlines()
    assert answer.startswith("Ann   (") and text == "Bo is a “cat”. [Ann] too."
    assert set(shades) <= set(" ░▒▓█") and legend.endswith("; the answer is marked)")


# From the command line


@pytest.fixture
def arguments(answerer, tmp_path):
    """Parse flags into settings with a saved model."""
    folder = tmp_path / "model"
    save_model(answerer.model, folder, answerer.tokenizer)

    def parse(*flags: str, **more) -> ConsoleSettings:
        parser = Parser(__doc__)
        parser.add_argument("model")
        add_console_flags(parser)
        args = parser.parse_args([str(folder), "--device", "cpu", *flags])
        return ConsoleSettings(**console_values(args), **more)

    return parse


def test_a_console_has_the_settings_of_the_command_line(arguments, capsys):
    console = load_console(arguments("--max_new_tokens", "3"))
    assert console.answerer.max_new_tokens == 3
    assert (console.as_json, console.layers, console.show_prompt) == (False, (), False)
    flags = ("--json", "--temperature", "0.5", "--top_k", "7", "--top_p", "0.5")
    console = load_console(arguments(*flags, explain=True, show_prompt=True))
    assert console.as_json and console.show_prompt and console.layers == [0, 1]
    assert capsys.readouterr().out == ""


def test_loading_generates_only_one_token(arguments, monkeypatch):
    """Its first use loads the kernels; an answer may have a million tokens."""
    chosen = []
    choose = Greedy.choose
    monkeypatch.setattr(Greedy, "choose", lambda *args: chosen.append(1) or choose(*args))
    console = load_console(arguments("--max_new_tokens", "1000000"))
    assert len(chosen) == 2 and console.answerer.max_new_tokens == 1000000


def test_the_layers_that_explain_are_read_from_the_folder(arguments):
    args = arguments()
    (Path(args.model) / LAYERS).write_text("[1]")
    assert load_console(replace(args, explain=True)).layers == [1]
    assert load_console(args).layers == ()


def test_the_note_of_a_model_is_printed_on_stderr(arguments, capsys):
    args = arguments()
    (Path(args.model) / NOTE).write_bytes(b"Made for tests\xe9\n")
    load_console(args)
    assert capsys.readouterr() == ("", "Made for tests\ufffd\n")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--question", " "], "--question: is empty"),
        (["--question", "Who?", "--question", ""], "--question: is empty"),
        (["--question", "M\udce9xico?"], "--question: .*UTF-8"),
        (["--top_k", "3"], "give a temperature above 0"),
        (["--top_p", "0.5"], "give a temperature above 0"),
    ],
)
def test_bad_flags_are_reported_before_a_model_is_loaded(arguments, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        load_console(replace(arguments(*flags), model="no such model"))


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
def test_invalid_numbers_are_refused(arguments, flags):
    with pytest.raises(UserError, match=flags[0]):
        arguments(*flags)
