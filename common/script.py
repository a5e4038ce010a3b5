"""What every script begins and ends with: it can be stopped at any moment, and fails in one line.

A script imports this before anything else. From then on Ctrl-C, SIGTERM and the end of its terminal
end it at once, whatever is being imported. While its `main` runs they raise an exception, so that
every `finally` is run, but for blocks that are `at_once`.
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

_AGAIN_SECONDS = 0.05
_FULL_OR_GONE = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO, errno.EFBIG)


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, its argument, has come."""


def run_script(main: Callable, parse_args: Callable) -> None:
    """Run a script's `main(parse_args())`: exit 2 with one line on a UserError, a path that the
    system refuses or an output that takes no more, 130 on Ctrl-C, 143 on SIGTERM."""
    try:
        args = parse_args()
        with _handled_by(_raise):
            try:
                main(args)
                sys.stdout.flush()
            finally:  # an alarm would kill the interpreter while it ends
                signal.setitimer(signal.ITIMER_REAL, 0)
    except UserError as error:
        sys.exit(_report(f"error: {error}", code=2))
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except _Terminated as error:
        _leave(error.args[0])
    except BrokenPipeError:  # whoever read our output has left, as `head` does
        _throw_output_away()
        sys.exit(141)
    except OSError as error:  # a path that cannot even be looked at: too long, not permitted
        if error.filename is not None:
            sys.exit(_report(f"error: {error.filename}: {error.strerror}", code=2))
        if error.errno not in _FULL_OR_GONE:
            raise
        _throw_output_away()
        sys.exit(_report(f"error: standard output or input: {error.strerror}", code=2))


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Nothing is at stake in this block: signals end the script without an exception."""
    with _handled_by(guard.end):
        yield


@contextmanager
def loading(what: str) -> Iterator[None]:
    """`say_loading` what this block loads, `at_once`."""
    report_loading(what)
    with exit_on_signal():
        yield


@contextmanager
def exit_on_signal_in_c() -> Iterator[None]:
    """As `at_once`, also while a C library computes that releases Python's lock: by a thread."""

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
        with _handled_by(lambda number, frame: None):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        thread.join()
        os.close(reading)
        os.close(writing)


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    before = guard.handle(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise(number: int, frame: FrameType | None) -> None:
    """A signal's handler while there is work that has to be left in order."""
    if os.getpid() != guard.PROCESS:
        os._exit(128 + number)
    if _is_importing(frame):  # which would make an ImportError of it
        _raise_later(number)
    else:
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__") not in guard.IMPORTS:
        frame = frame.f_back
    return frame is not None


def _raise_later(number: int) -> None:
    signal.signal(signal.SIGALRM, lambda _, frame: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)


def _raise_swallowed_again(unraisable) -> None:
    """What Python calls for an exception that goes nowhere, as in what C calls back."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _raise_later(signal.SIGINT)
    elif issubclass(unraisable.exc_type, _Terminated):
        _raise_later(unraisable.exc_value.args[0])
    else:
        sys.__unraisablehook__(unraisable)


def _leave(number: int) -> None:
    """End because of a signal. To take an interpreter with PyTorch in it apart can take seconds."""
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


def _throw_output_away() -> None:
    """What is still to be written, which Python would try at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Log(io.FileIO):
    """Standard error, which may be full or gone: what cannot be said ends no work."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _prepare_streams() -> None:
    """Streams that were closed are empty; characters that an encoding lacks are escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who ran the script
            null = os.open(os.devnull, os.O_RDWR)  # the number of the one that was closed
            setattr(sys, name, os.fdopen(null, mode, closefd=False))
    if sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    raw = io.BufferedWriter(_Log(sys.stderr.fileno(), "w", closefd=False))
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
    guard.stderr = os.dup(sys.stderr.fileno())


if guard.IS_SCRIPT:
    sys.unraisablehook = _raise_swallowed_again
    _prepare_streams()
