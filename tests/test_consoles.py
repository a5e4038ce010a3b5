"""The consoles at a pseudo-terminal: typing, pasting, interrupting, ending."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pyte
import pytest

ROOT = Path(__file__).parents[1]
PASSAGE = (ROOT / "data/demo/passage.txt").read_text().strip()
FIRST, SECOND = PASSAGE[: PASSAGE.index("A meal")], PASSAGE[PASSAGE.index("A meal") :]
OWNER = "Tell me the name of the owner of the Bright Feather Hotel."
ROOMS = "What number of rooms does the Wild Swan Hotel have?"
WITH_CONTEXT, TRIVIA = "prompt_mamba_with_context.py", "prompt_mamba.py"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"

# A model so slow that it can be interrupted.
SLOW = """
import runpy, sys, time
from mamba_lm import generate
def slow(step):
    return lambda *args: time.sleep(0.4) or step(*args)
make = generate.make_step
generate.make_step = lambda *args: slow(make(*args))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# As if packages were not installed.
WITHOUT_PACKAGES = """
import runpy, sys
sys.modules |= {"prompt_toolkit": None, "rich": None, "rich.console": None}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# SIGTERM arrives while prompt_toolkit runs a task of its own.
SIGTERM_IN_A_TASK = """
import runpy, signal, sys
from prompt_toolkit.output import vt100
get_size = vt100._get_size
def interrupted(number):
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_poll_output_size":
            signal.raise_signal(signal.SIGTERM)
        frame = frame.f_back
    return get_size(number)
vt100._get_size = interrupted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Terminal:
    """A program at a pseudo-terminal, and its screen."""

    def __init__(self, command: list[str], size: tuple[int, int], environment: dict[str, str]):
        rows, columns = size
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._process = pexpect.spawn(
            command[0], command[1:], cwd=ROOT, env=environment, dimensions=size
        )

    def text(self) -> str:
        """All lines, including those that have scrolled off the screen."""
        scrolled = [
            "".join(line[column].data for column in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*scrolled, *self.screen.display]).rstrip()

    def send(self, keys: str | bytes) -> None:
        self._process.send(keys)

    def paste(self, text: str) -> None:
        """Bracketed paste, which marks pasted text."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def wait_for(self, text: str, count: int = 1) -> str:
        """All of the text, once it contains `text` count times."""
        self._wait(lambda: self.text().count(text) >= count, text)
        return self.text()

    def end(self) -> int:
        """The exit status, once the program ends."""
        self._wait(lambda: False, None)
        self._process.close()
        return self._process.exitstatus

    def kill(self, number: int) -> None:
        self._process.kill(number)

    def close(self) -> None:
        self._process.close(force=True)

    def _wait(self, is_there: Callable[[], bool], wanted: str | None) -> None:
        """Until is_there(), or until the program ends if wanted is None."""
        deadline = time.monotonic() + 60
        while not is_there():
            try:
                self._stream.feed(self._process.read_nonblocking(1 << 16, timeout=0.1))
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                assert wanted is None or is_there(), f"ended without {wanted!r}:\n{self.text()}"
                return
            assert time.monotonic() < deadline, f"no {wanted!r}:\n{self.text()}"


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Terminal]]:
    """Start a script with models/demo at a terminal; its history stays within the test."""
    started = []

    def run(script: str, *flags: str, by: str = "", size=(24, 80), **environment: str) -> Terminal:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "TERM": "xterm-256color",
            "COLORTERM": "",
            "XDG_STATE_HOME": str(tmp_path),
            **environment,
        }
        program = ["-c", by, script] if by else [script]
        command = [sys.executable, *program, "models/demo", *flags]
        started.append(Terminal(command, size, environment))
        return started[-1]

    yield run
    for terminal in started:
        terminal.close()


def test_a_context_is_pasted_and_answers_are_interrupted(start, tmp_path):
    terminal = start(WITH_CONTEXT, by=SLOW)
    terminal.wait_for("Context, ended by an empty line:")
    terminal.paste(f"{FIRST}\n\n{SECOND}")  # an empty line within pasted text does not end it
    terminal.send("\r\r")
    terminal.wait_for("\nQ:")
    terminal.send(f"{ROOMS}\r")
    terminal.wait_for("A: I")
    terminal.send(CTRL_C)
    text = terminal.wait_for("stopped; Ctrl-D ends")
    assert "confidence" not in text and " ...\n" in text
    terminal.send(f"{OWNER}\r")
    terminal.wait_for("A: Marco")
    assert "Quill" not in terminal.text().split("A: Marco")[1], "words are printed one by one"
    terminal.wait_for("A: Marco Quill   (confidence 0.8")
    terminal.send(b"M\xe9xico?\r")
    terminal.wait_for("error: standard input: not UTF-8")
    terminal.send("typed and discarded" + CTRL_C)
    terminal.wait_for("stopped; Ctrl-D ends", count=2)
    terminal.send("/show\r")
    terminal.wait_for("at the Bright Feather Hotel is $75.", count=2)
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    [history] = tmp_path.rglob("prompt_mamba_with_context_history")
    kept = [line[1:] for line in history.read_text().splitlines() if line.startswith("+")]
    assert kept[:2] == [ROOMS, OWNER] and kept[-1] == "/show"
    assert history.stat().st_mode & 0o077 == 0, "only for its owner"


def test_trivia_is_asked_and_interrupted(start, tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"question": "Who is Bo?", "answer": "a cat"}\n')
    flags = ("--shots", str(shots), "--show_prompt", "--max_new_tokens", "4")
    terminal = start(TRIVIA, *flags, by=SLOW)
    terminal.wait_for("Commands: /show, /stats, /help.")
    assert "Q: Who is Bo?\nA: a cat\n" in terminal.text()
    terminal.send("Who is Ann?\r")
    terminal.wait_for("Q: Who is Ann?", count=2)  # as typed, and as the model reads it
    terminal.wait_for("\nA:\nA: ")
    terminal.send(CTRL_C)
    terminal.wait_for("stopped; Ctrl-D ends")
    terminal.send(f"{UP}\r")
    terminal.wait_for("(confidence")
    assert terminal.text().count("Q: Who is Ann?") == 4
    terminal.send(CTRL_D)
    assert terminal.end() == 0


def colours(terminal: Terminal, text: str) -> set[tuple[str, bool]]:
    """Background and underline of the characters of a text on the screen, except spaces."""
    for row, line in enumerate(terminal.screen.display):
        if text in line:
            start = line.index(text)
            cells = [terminal.screen.buffer[row][start + n] for n in range(len(text))]
            return {(cell.bg, cell.underscore) for cell in cells if cell.data != " "}
    raise AssertionError(f"no {text!r}")


def test_explanations_have_colours_and_the_history_is_kept(start, tmp_path):
    history = tmp_path / "mamba_dive/prompt_mamba_with_context_history"
    history.parent.mkdir()
    history.write_bytes(f"\n# before\n+M\xe9xico?\n\n# then\n+{OWNER}\n".encode("latin-1"))
    flags = ("--context_file", "data/demo/passage.txt", "--explain")
    terminal = start(WITH_CONTEXT, *flags, COLORTERM="truecolor")
    terminal.wait_for("\nQ:")
    terminal.send(f"{UP}\r")
    terminal.wait_for("the answer is marked)")
    assert "A: Marco Quill   (confidence 0.88" in terminal.text()
    assert {underlined for _, underlined in colours(terminal, "Marco Quill.")} == {True, False}
    assert colours(terminal, " 209") == {("f57c1f", False)}, "its Δ is largest at numbers"
    assert len(colours(terminal, "This page is about hotels.")) > 1
    terminal.send(CTRL_D)
    assert terminal.end() == 0


def test_a_tiny_terminal_without_colours(start):
    flags = ("--context_file", "data/demo/passage.txt", "--explain")
    terminal = start(WITH_CONTEXT, *flags, size=(5, 24), NO_COLOR="1")
    terminal.wait_for("\nQ:")
    terminal.send(f"{OWNER}\r")
    text = terminal.wait_for("the answer is")
    assert "█" in text and "[Marco Quill]" in text
    assert {cell.bg for line in terminal.screen.buffer.values() for cell in line.values()} == {
        "default"
    }
    terminal.send(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.parametrize("by", [WITHOUT_PACKAGES, ""], ids=["without packages", "dumb"])
def test_a_terminal_without_editing(start, by):
    terminal = start(WITH_CONTEXT, by=by, TERM="dumb")
    terminal.wait_for("Context, ended by an empty line:")
    # A terminal's own line buffer holds 4,096 bytes: lines, as a user would type them.
    terminal.send("".join(f"{line}\n" for line in [*PASSAGE.replace(". ", ".\n").split("\n"), ""]))
    terminal.wait_for("\nQ:")
    terminal.send(CTRL_C)
    terminal.wait_for("stopped; Ctrl-D ends")
    terminal.send(f"{OWNER}\n")
    terminal.wait_for("A: Marco Quill   (confidence 0.")
    terminal.send(CTRL_D)
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),  # as at another question
        (CTRL_C, 130),
        (CTRL_D, 0),
    ],
)
def test_no_context_is_typed(start, sent, code):
    terminal = start(WITH_CONTEXT)
    terminal.wait_for("Context, ended by an empty line:")
    time.sleep(0.5)  # the prompt takes a moment to appear
    if isinstance(sent, str):
        terminal.send(sent)
    else:
        terminal.kill(sent)
    assert terminal.end() == code
    assert "Traceback" not in terminal.text()


def test_sigterm_in_a_task_of_the_prompt(start):
    terminal = start(WITH_CONTEXT, by=SIGTERM_IN_A_TASK)
    assert terminal.end() == 143
    assert terminal.text().endswith("\nterminated")


def test_standard_output_has_only_json(start, tmp_path):
    output = tmp_path / "answers.jsonl"
    command = (
        f"exec {sys.executable} {WITH_CONTEXT} models/demo --json "
        f"--context_file data/demo/passage.txt > {output}"
    )
    terminal = Terminal(
        ["/bin/sh", "-c", command],
        (24, 80),
        os.environ | {"XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1"},
    )
    terminal.wait_for("\nQ:")
    terminal.send(f"{OWNER}\r")
    terminal.wait_for("\nQ:", count=2)
    terminal.send(CTRL_D)
    assert terminal.end() == 0
    [line] = output.read_text().splitlines()
    assert re.match(r'\{"question": ".*", "answer": "Marco Quill", ', line)


def test_the_recording_in_the_documentation(start):
    """It shows, but for times, what a user sees who types the same."""
    page = (ROOT / "docs/console.md").read_text(encoding="utf-8")
    command, recording = re.search(r"```\n\$ (python prompt_.*)\n((?:.*\n)*?)```", page).groups()
    terminal = start(*command.split()[1:2], *command.split()[3:], size=(60, 80), NO_COLOR="1")
    for count, typed in enumerate(re.findall(r"^Q: (.+)$", recording, re.MULTILINE), start=1):
        terminal.wait_for("\nQ:", count=count)
        terminal.send(f"{typed}\r")
    terminal.wait_for("\nQ:", count=count + 1)
    terminal.send(CTRL_D)
    assert terminal.end() == 0

    def without_times(text: str) -> str:
        return re.sub(r"[\d,.]+ (s|tokens/s)\b", r"... \1", text)

    assert count == 3 and "█" in recording
    assert without_times(terminal.text()) == without_times(recording.rstrip() + "\nQ:")
