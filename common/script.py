"""Run a script's `main`, so that it can be stopped at any moment and fails with one line.

A script imports this before anything else. From then on Ctrl-C, SIGTERM and the end of its terminal
(SIGHUP) end it immediately, whatever is being imported. While `main` runs, these signals raise an
exception, so that every `finally` block runs; blocks under `exit_on_signal` end immediately.
"""

import atexit
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from common import guard
from common.errors import UserError, printable, report_loading

_RETRY_SECONDS = 0.05
_FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO, errno.EFBIG)


class _Terminated(BaseException):
    """Raised by SIGTERM and SIGHUP; the argument is the signal's number."""


def run_script(main: Callable, parse_args: Callable) -> None:
    """Run a script's `main(parse_args())` and turn its end into an exit code.

    Args:
        main: takes the parsed arguments.
        parse_args: takes nothing and returns the arguments, or raises a UserError.

    Exit codes: 0; 2 with one line on standard error after a UserError, a path that the system
    refuses, or a full or closed standard output; 130 after Ctrl-C, 143 after SIGTERM, 129 after
    SIGHUP; 141 if the reader of standard output has closed it. Other exceptions are bugs and give a
    traceback.
    """
    try:
        args = parse_args()
        with _handle_signals(_raise):
            try:
                main(args)
                sys.stdout.flush()
            finally:  # an alarm would kill the interpreter while it ends
                signal.setitimer(signal.ITIMER_REAL, 0)
    except UserError as error:
        sys.exit(_report(f"error: {error}", code=2))
    except KeyboardInterrupt:
        _exit_after(signal.SIGINT)
    except _Terminated as error:
        _exit_after(error.args[0])
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        discard_stdout()
        sys.exit(141)
    except OSError as error:  # a path that cannot even be looked up: too long, not permitted
        if error.filename is not None:
            sys.exit(_report(f"error: {error.filename}: {error.strerror}", code=2))
        if error.errno not in _FULL_OR_CLOSED:
            raise
        discard_stdout()
        sys.exit(_report(f"error: standard output or input: {error.strerror}", code=2))


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """A block with nothing to save or clean up: a signal ends the script without an exception."""
    with _handle_signals(guard.end):
        yield


@contextmanager
def loading(what: str) -> Iterator[None]:
    """`exit_on_signal` for a block that loads something, which `report_loading` reports."""
    report_loading(what)
    with exit_on_signal():
        yield


@contextmanager
def exit_on_signal_in_c() -> Iterator[None]:
    """`exit_on_signal` for a block in which a C library computes for long without the GIL.

    Python runs signal handlers only between bytecodes, so that a thread waits for the signal.
    """

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if number in guard.SIGNALS:
                guard.end(number, None)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with _handle_signals(lambda number, frame: None):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)


@contextmanager
def _handle_signals(handler: Callable) -> Iterator[None]:
    before = guard.handle(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise(number: int, frame: FrameType | None) -> None:
    """The signal handler while `main` runs."""
    if os.getpid() != guard.PROCESS:
        os._exit(128 + number)
    if _is_importing(frame):  # a module may turn the exception into an ImportError
        _raise_later(number)
    else:
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__") not in guard.IMPORTS:
        frame = frame.f_back
    return frame is not None


def _raise_later(number: int) -> None:
    signal.signal(signal.SIGALRM, lambda _, frame: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)


def _raise_ignored_again(unraisable) -> None:
    """The hook for exceptions that Python ignores, as in `__del__` and in callbacks from C."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _raise_later(signal.SIGINT)
    elif issubclass(unraisable.exc_type, _Terminated):
        _raise_later(unraisable.exc_value.args[0])
    else:
        sys.__unraisablehook__(unraisable)


def _exit_after(number: int) -> None:
    """Exit because of a signal. The normal end of an interpreter with PyTorch can take seconds."""
    code = _report(guard.word(number), code=128 + number)
    if guard.IS_SCRIPT:
        atexit._run_exitfuncs()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _report(line: str, code: int) -> int:
    print(printable(line), file=sys.stderr)
    return code


def _prepare_streams() -> None:
    """Open closed streams on /dev/null, escape characters that an encoding lacks, and ignore errors
    when standard error is written."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the program that ran the script
            null = os.open(os.devnull, os.O_RDWR)  # gets the number of the closed descriptor
            setattr(sys, name, os.fdopen(null, mode, closefd=False))
    if sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    raw = io.BufferedWriter(_ForgivingFile(sys.stderr.fileno(), "w", closefd=False))
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)


class _ForgivingFile(io.FileIO):
    """Standard error may be full or closed: a message that cannot be written stops no work."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def discard_stdout() -> None:
    """Send standard output to /dev/null, so that Python's flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_utf_8() -> None:
    """Make standard output UTF-8 in any locale, as readers of JSON and CSV expect."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


if guard.IS_SCRIPT:
    sys.unraisablehook = _raise_ignored_again
    _prepare_streams()
    guard.stderr = os.dup(sys.stderr.fileno())
