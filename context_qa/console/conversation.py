"""A console's conversation: what is typed or piped in is asked, commands are obeyed."""

import contextlib
import functools
from collections.abc import Sequence

from common.errors import UserError
from context_qa.console.console import Console
from context_qa.console.terminal import Lines, checked_context, keyboard, read_context


class Conversation:
    """Questions to a console from where its standard input comes from.

    script: under whose name a terminal's history is kept. loads_contexts: whether another context
    may be asked for.
    """

    def __init__(self, console: Console, script: str, loads_contexts: bool = True):
        self.console, self.say = console, console.screen.say
        self.commands = {
            "/context": ("[FILE]", "read another context, typed or from a file", self._context),
            "/show": ("", "print what has been read", self._show),
            "/stats": ("", "speed, time to the first token, size of the state", self._stats),
            "/help": ("", "this list", self._help),
        }
        if not loads_contexts:
            del self.commands["/context"]
        self._script = script

    @functools.cached_property
    def lines(self) -> Lines:
        """Made when something is to be typed: standard input may be closed where nothing is."""
        screen, as_json = self.console.screen, self.console.as_json
        return keyboard(screen, self._script, as_json, list(self.commands))

    def run(self, context: str | None = None, questions: Sequence[str] | None = None) -> None:
        """Read a context and ask about it; what is not given is typed. At a terminal, Ctrl-D ends
        it."""
        with contextlib.suppress(EOFError):
            self.console.read(self._typed_context() if context is None else context)
            for question in questions or ():
                self.console.ask(question)
            if not questions:
                self._converse()

    def _converse(self) -> None:
        """Ask line after line, until EOFError. At a terminal Ctrl-C ends no more than what is being
        done, and lines that begin with a slash are commands."""
        is_interactive = self.lines.is_interactive
        if is_interactive:
            self.say(f"Commands: {', '.join(self.commands)}. Ctrl-C stops, Ctrl-D ends.")
        while True:
            try:
                line = self.lines.question()
                if is_interactive and line.startswith("/"):
                    self._obey(line)
                elif line:
                    self.console.ask(line, "A: " if is_interactive else "")
            except KeyboardInterrupt:
                if not is_interactive:
                    raise
                self.say("stopped; Ctrl-D ends")
            except UserError as error:  # a file that is missing, bytes that are no text
                if not is_interactive:
                    raise
                self.say(f"error: {error}")

    def _typed_context(self) -> str:
        return checked_context(self.lines.context(), "standard input")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command not in self.commands:
            raise UserError(f"{command}: no such command; /help lists them")
        self.commands[command][2](argument.strip())

    def _context(self, path: str) -> None:
        if path == "-":
            raise UserError("/context -: /context alone asks for one")
        path = path.strip("'\"")  # as terminals write the name of a file that is dropped on them
        self.console.read(read_context(path) if path else self._typed_context())

    def _show(self, _: str) -> None:
        self.say(self.console.passage.text)

    def _stats(self, _: str) -> None:
        passage, first, last = self.console.passage, self.console.first, self.console.last
        self.say(
            f"context: {passage.num_tokens:,} tokens, read in {passage.seconds:.2f} s "
            f"({passage.num_tokens / passage.seconds:,.0f} tokens/s)\n"
            f"state: {passage.state.num_bytes / 1e3:,.0f} kB"
        )
        if last is not None:
            self.say(
                f"time to first token: {last.seconds_to_first_token:.3f} s; of the first answer, "
                f"with the context: {passage.seconds + first.seconds_to_first_token:.3f} s\n"
                f"last answer: {last.num_new_tokens} tokens, "
                f"{last.num_new_tokens / last.seconds:.1f} tokens/s"
            )

    def _help(self, _: str) -> None:
        for name, (argument, what, _) in self.commands.items():
            self.say(f"{name} {argument}".ljust(18) + what)
        self.say("Ctrl-C stops an answer, Ctrl-D ends. What begins with no slash is a question.")
