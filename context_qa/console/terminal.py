"""A console's two ends: what is typed or piped in, and what is shown.

On a terminal prompt_toolkit edits lines and keeps their history, and rich styles what is shown.
Without one, or without these packages, both are plain lines.
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
from context_qa.console.explanation import ASCII, BLOCKS, Explanation, shown

ASKS_FOR_CONTEXT = "Context, ended by an empty line:"
ASKS_FOR_QUESTION = "Q: "


class Screen:
    """Answers go to standard output, everything else to standard error."""

    def __init__(self, as_json: bool = False):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a character shows "?"
                stream.reconfigure(errors="replace")
                if as_json and stream is sys.stdout:
                    stream.reconfigure(encoding="utf-8")
        self._rich = _rich_console()

    def say(self, text: str, end: str = "\n") -> None:
        print(shown(text), end=end, file=sys.stderr, flush=True)

    def write(self, text: str, style: str = "") -> None:
        """Show a piece of an answer, at once."""
        text = shown(text)
        if self._rich is None:
            print(text, end="", flush=True)
        else:
            self._rich.out(text, style=style, end="", highlight=False)

    def explain(self, explanation: Explanation) -> None:
        """Show a context by colours where they are to be had, else by a line of shades below each
        of its lines."""
        if self._rich is not None and self._rich.color_system and not self._rich.no_color:
            from rich.text import Text

            parts = [shown(character) for character in explanation.context]
            places = list(itertools.accumulate(map(len, parts), initial=0))
            text = Text("".join(parts))
            for style, start, end in explanation.styles():
                text.stylize(style, places[start], places[end])
            # Too narrow for words, rich would leave wide characters out; the terminal does not.
            self._rich.print(text, soft_wrap=self._rich.width < 20)
        else:
            width = shutil.get_terminal_size().columns
            shades = BLOCKS if _holds(sys.stdout, BLOCKS) else ASCII
            print("\n".join(explanation.plain_lines(width, shades)))
        self.write(f"({explanation.legend()})\n", "dim")


def _rich_console():
    """None where it would show plain text alone."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=sys.stdout)
    if not console.width:  # as COLUMNS=0 has it: nothing would be shown
        console.width = shutil.get_terminal_size().columns
    return console if console.is_terminal else None


def _holds(stream, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Lines:
    """What is typed or piped in, line by line."""

    def __init__(self, screen: Screen):
        self._screen = screen
        self.is_interactive = sys.stdin.isatty()

    def context(self) -> str:
        """What comes up to an empty line; EOFError where a terminal's user ends it before."""
        self._screen.say(ASKS_FOR_CONTEXT)
        lines = []
        while (line := typed(sys.stdin.readline)).strip("\n"):
            lines.append(line)
        if self.is_interactive and not line and not lines:
            raise EOFError
        return "".join(lines)

    def question(self) -> str:
        """The next line; EOFError at the end."""
        if self.is_interactive:
            self._screen.say(ASKS_FOR_QUESTION, end="")
        line = typed(sys.stdin.readline)
        if not line:
            raise EOFError
        return line.strip()


def typed(read: Callable[[], str]) -> str:
    """What standard input gives; UserError if that is not UTF-8, whatever the locale says."""
    stdin = sys.stdin
    is_new = isinstance(stdin, io.TextIOWrapper) and stdin.encoding != "utf-8-sig"
    if is_new and not stdin.isatty():  # it cannot be set once something has been read
        stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        text = read()
        text.encode()  # what is not UTF-8 fails here if a terminal let it through
    except UnicodeError as error:
        raise UserError("standard input: not UTF-8; convert it to UTF-8") from error
    return text


class Prompts(Lines):
    """A terminal's, by prompt_toolkit: lines can be edited, pasted whole and found again."""

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
            history=_kept(history),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            enable_suspend=True,
        )

    def context(self) -> str:
        self._screen.say(ASKS_FOR_CONTEXT)
        return typed(lambda: _ask(self._contexts, ""))

    def question(self) -> str:
        return " ".join(typed(lambda: _ask(self._questions, ASKS_FOR_QUESTION)).split())


def _ask(session, message: str) -> str:
    """What is typed at a prompt. Signals that end the script are handled by its event loop: what
    their handlers raise would be lost in one of the loop's own tasks."""
    import asyncio

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if callable(handler)}

    def end(number: int) -> None:
        try:
            before[number](number, None)
        except BaseException as error:
            if not session.app.is_done:
                session.app.exit(exception=error)

    def prepare() -> None:
        for number in before:
            asyncio.get_running_loop().add_signal_handler(number, end, number)

    try:
        return session.prompt(message, pre_run=prepare)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _context_keys():
    """Enter on an empty last line ends a context, as does Ctrl-D, which with nothing typed ends the
    console. Empty lines that are pasted are the context's own."""
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


def _kept(path: Path | None):
    """A history in a file that no one else can read, or in memory where there can be none."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk ends no conversation
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
    """Where a script keeps what was asked, by the XDG base directories; None without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # which is to be ignored
        state = os.path.expanduser("~/.local/state")
    return Path(state) / "mamba_dive" / f"{script}_history" if os.path.isabs(state) else None


def keyboard(screen: Screen, script: str, as_json: bool, commands: Sequence[str]) -> Lines:
    """Prompts where there is a terminal to type at and one to show what is typed: that of standard
    error, or of standard output, unless that has JSON; elsewhere plain lines."""
    streams = [sys.stderr] if as_json else [sys.stderr, sys.stdout]
    stream = next((stream for stream in streams if stream.isatty()), None)
    if not sys.stdin.isatty() or stream is None:
        return Lines(screen)
    try:
        return Prompts(screen, stream, history_path(script), commands)
    except ImportError:
        return Lines(screen)


def read_context(path: str) -> str:
    """The context in a file, or on standard input if that is "-"; without blanks around it."""
    if path != "-":
        context = read_text(os.path.expanduser(path), "a text file")
    else:
        path, context = "standard input", typed(sys.stdin.read)
    return checked_context(context, path)


def checked_context(context: str, source: str) -> str:
    """The context without blanks around it; UserError if that is all it was."""
    if not context.strip():
        raise UserError(f"{source}: the context is empty")
    return context.strip()
