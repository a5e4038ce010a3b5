"""A conversation with a console: questions and commands from standard input."""

import contextlib
import functools
from collections.abc import Sequence

from common.errors import UserError
from context_qa.console.console import Console
from context_qa.console.terminal import LineInput, checked_context, make_input, read_context


class Conversation:
    """Passes questions and commands from standard input to a console.

    script: the name of the history file. loads_contexts: whether /context is a command.
    """

    def __init__(self, console: Console, script: str, loads_contexts: bool = True):
        self.console, self.print_status = console, console.screen.print_status
        self.commands = {
            "/context": (
                "[FILE]",
                "read another context, typed or from a file",
                self._read_context,
            ),
            "/show": ("", "print the context", self._print_context),
            "/stats": ("", "speed, time to the first token, size of the state", self._print_stats),
            "/help": ("", "print this list", self._print_help),
        }
        if not loads_contexts:
            del self.commands["/context"]
        self._script = script

    @functools.cached_property
    def input(self) -> LineInput:
        """Created when it is first needed: standard input may be closed if it never is."""
        screen, as_json = self.console.screen, self.console.as_json
        return make_input(screen, self._script, as_json, list(self.commands))

    def run(self, context: str | None = None, questions: Sequence[str] | None = None) -> None:
        """Read a context and ask questions on it; what is not given is read from standard input. At
        a terminal, Ctrl-D ends the conversation."""
        with contextlib.suppress(EOFError):
            self.console.read(self._input_context() if context is None else context)
            for question in questions or ():
                self.console.ask(question)
            if not questions:
                self._answer_lines()

    def _answer_lines(self) -> None:
        """Answer line after line, until EOFError. At a terminal, Ctrl-C stops only the current
        answer or command, and lines that start with a slash are commands."""
        is_interactive = self.input.is_interactive
        if is_interactive:
            self.print_status(f"Commands: {', '.join(self.commands)}. Ctrl-C stops, Ctrl-D ends.")
        while True:
            try:
                line = self.input.question()
                if is_interactive and line.startswith("/"):
                    self._run_command(line)
                elif line:
                    self.console.ask(line, "A: " if is_interactive else "")
            except KeyboardInterrupt:
                if not is_interactive:
                    raise
                self.print_status("stopped; Ctrl-D ends")
            except UserError as error:  # a missing file, bytes that are not UTF-8
                if not is_interactive:
                    raise
                self.print_status(f"error: {error}")

    def _input_context(self) -> str:
        return checked_context(self.input.context(), "standard input")

    def _run_command(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command not in self.commands:
            raise UserError(f"{command}: unknown command; /help lists all")
        self.commands[command][2](argument.strip())

    def _read_context(self, path: str) -> None:
        if path == "-":
            raise UserError("/context -: to type a context, enter /context alone")
        path = path.strip("'\"")  # as terminals quote the name of a file that is dropped on them
        self.console.read(read_context(path) if path else self._input_context())

    def _print_context(self, _: str) -> None:
        self.print_status(self.console.context.text)

    def _print_stats(self, _: str) -> None:
        context, first, last = self.console.context, self.console.first, self.console.last
        self.print_status(
            f"context: {context.num_tokens:,} tokens, read in {context.seconds:.2f} s "
            f"({context.num_tokens / context.seconds:,.0f} tokens/s)\n"
            f"state: {context.state.num_bytes / 1e3:,.0f} kB"
        )
        if last is not None:
            self.print_status(
                f"time to first token: {last.seconds_to_first_token:.3f} s; of the first answer, "
                f"with the context: {context.seconds + first.seconds_to_first_token:.3f} s\n"
                f"last answer: {last.num_new_tokens} tokens, "
                f"{last.num_new_tokens / last.seconds:.1f} tokens/s"
            )

    def _print_help(self, _: str) -> None:
        for name, (argument, description, _) in self.commands.items():
            self.print_status(f"{name} {argument}".ljust(18) + description)
        self.print_status("Ctrl-C stops an answer, Ctrl-D ends. Any other line is a question.")
