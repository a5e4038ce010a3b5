"""Input and output of a console.

On a terminal, prompt_toolkit edits lines and keeps a history, and rich prints styles. Without a
terminal, or without these packages, both are plain lines.
"""

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from common.input_files import read_text
from context_qa.console.explanation import ASCII, BLOCKS, Explanation, to_printable

CONTEXT_PROMPT = "Context, ended by an empty line:"
QUESTION_PROMPT = "Q: "


class Screen:
    """Prints answers on standard output, and everything else on standard error."""

    def __init__(self, as_json: bool = False):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # "?" for a character that the locale lacks
                stream.reconfigure(errors="replace")
                if as_json and stream is sys.stdout:
                    stream.reconfigure(encoding="utf-8")
        self._rich = _rich_console()

    def print_status(self, text: str, end: str = "\n") -> None:
        print(to_printable(text), end=end, file=sys.stderr, flush=True)

    def print_answer(self, text: str, style: str = "") -> None:
        """Print a piece of an answer, at once."""
        text = to_printable(text)
        if self._rich is None:
            print(text, end="", flush=True)
        else:
            self._rich.out(text, style=style, end="", highlight=False)

    def print_explanation(self, explanation: Explanation) -> None:
        """Print a context with colours if the terminal has them, else with a line of shades below
        each line."""
        if self._rich is not None and self._rich.color_system and not self._rich.no_color:
            from rich.text import Text

            parts = [to_printable(character) for character in explanation.context]
            places = list(itertools.accumulate(map(len, parts), initial=0))
            text = Text("".join(parts))
            for style, start, end in explanation.styles():
                text.stylize(style, places[start], places[end])
            # On a narrow terminal rich drops wide characters; soft wrapping does not.
            self._rich.print(text, soft_wrap=self._rich.width < 20)
        else:
            width = shutil.get_terminal_size().columns
            shades = BLOCKS if _can_encode(sys.stdout, BLOCKS) else ASCII
            print("\n".join(explanation.plain_lines(width, shades)))
        self.print_answer(f"({explanation.legend()})\n", "dim")


def _rich_console():
    """None if it would only print plain text."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=sys.stdout)
    if not console.width:  # with COLUMNS=0: nothing would be printed
        console.width = shutil.get_terminal_size().columns
    return console if console.is_terminal else None


def _can_encode(stream, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


class LineInput:
    """Contexts and questions from standard input, line by line."""

    def __init__(self, screen: Screen):
        self._screen = screen
        self.is_interactive = sys.stdin.isatty()

    def context(self) -> str:
        """Lines up to an empty one. Raises EOFError if the user of a terminal ends it before."""
        self._screen.print_status(CONTEXT_PROMPT)
        lines = []
        while (line := read_input(sys.stdin.readline)).strip("\n"):
            lines.append(line)
        if self.is_interactive and not line and not lines:
            raise EOFError
        return "".join(lines)

    def question(self) -> str:
        """The next line. Raises EOFError at the end."""
        if self.is_interactive:
            self._screen.print_status(QUESTION_PROMPT, end="")
        line = read_input(sys.stdin.readline)
        if not line:
            raise EOFError
        return line.strip()


def read_input(read: Callable[[], str]) -> str:
    """Call read, which reads standard input, as UTF-8 in any locale. Raises UserError if the input
    is not UTF-8."""
    stdin = sys.stdin
    is_unread = isinstance(stdin, io.TextIOWrapper) and stdin.encoding != "utf-8-sig"
    if is_unread and not stdin.isatty():  # once something is read, it cannot be set
        stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        text = read()
        text.encode()  # a terminal may give surrogates for bytes that are not UTF-8
    except UnicodeError as error:
        raise UserError("standard input: not UTF-8; convert it to UTF-8") from error
    return text


class PromptInput(LineInput):
    """Input at a terminal by prompt_toolkit, with editing, pasting and history."""

    def __init__(self, screen: Screen, stream, history: Path | None, commands: Sequence[str]):
        super().__init__(screen)
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output

        output = create_output(stdout=stream)
        self._contexts = PromptSession(
            output=output, multiline=True, key_bindings=_context_keys(), enable_suspend=True
        )
        self._questions = PromptSession(
            output=output,
            history=_open_history(history),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            enable_suspend=True,
        )

    def context(self) -> str:
        self._screen.print_status(CONTEXT_PROMPT)
        return read_input(lambda: _prompt(self._contexts, ""))

    def question(self) -> str:
        return " ".join(read_input(lambda: _prompt(self._questions, QUESTION_PROMPT)).split())


def _prompt(session, message: str) -> str:
    """The text typed at a prompt. Signals that end the script are handled by the event loop:
    exceptions of their handlers would be lost in one of the loop's own tasks."""
    import asyncio

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

    def end(number: int) -> None:
        try:
            handlers[number](number, None)
        except BaseException as error:
            if not session.app.is_done:
                session.app.exit(exception=error)

    def prepare() -> None:
        for number in handlers:
            asyncio.get_running_loop().add_signal_handler(number, end, number)

    try:
        return session.prompt(message, pre_run=prepare)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _context_keys():
    """Enter on an empty last line ends a context, as does Ctrl-D. Ctrl-D with no text ends the
    console. Pasted empty lines are part of the context."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event) -> None:
        document = event.current_buffer.document
        is_last = document.is_cursor_at_the_end and not document.current_line.strip()
        if not is_last:
            event.current_buffer.newline()
        elif document.text.strip():
            event.current_buffer.validate_and_handle()

    @keys.add("c-d")
    def end(event) -> None:
        if event.current_buffer.text.strip():
            event.current_buffer.validate_and_handle()
        else:
            event.app.exit(exception=EOFError)

    return keys


def _open_history(path: Path | None):
    """A history in a file that only its owner can read; in memory if it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk must not end the conversation
                super().store_string(string)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return History(path)


def history_path(script: str) -> Path | None:
    """The history file of a script, by the XDG base directories; None without a home folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # the XDG specification ignores it then
        state = os.path.expanduser("~/.local/state")
    return Path(state) / "mamba_dive" / f"{script}_history" if os.path.isabs(state) else None


def make_input(screen: Screen, script: str, as_json: bool, commands: Sequence[str]) -> LineInput:
    """A PromptInput if there is a terminal for input and one for output: standard error, or
    standard output unless answers are JSON. Otherwise a LineInput."""
    streams = [sys.stderr] if as_json else [sys.stderr, sys.stdout]
    stream = next((stream for stream in streams if stream.isatty()), None)
    if not sys.stdin.isatty() or stream is None:
        return LineInput(screen)
    try:
        return PromptInput(screen, stream, history_path(script), commands)
    except ImportError:
        return LineInput(screen)


def read_context(path: str) -> str:
    """Read a context from a file, or from standard input if path is "-"; without outer spaces."""
    if path != "-":
        context = read_text(os.path.expanduser(path), "a text file")
    else:
        path, context = "standard input", read_input(sys.stdin.read)
    return checked_context(context, path)


def checked_context(context: str, source: str) -> str:
    """The context without outer spaces. Raises UserError if it is empty."""
    if not context.strip():
        raise UserError(f"{source}: the context is empty; give a text")
    return context.strip()
