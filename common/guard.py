"""From the import of this module on, a signal ends a script immediately, with one line.

It imports only modules that Python has loaded already. While it imported `signal`, Ctrl-C would
still give a traceback.
"""

import _signal as signal
import os
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROCESS = os.getpid()
stderr = 2  # `script` sets a copy: descriptor 2 is silenced while some libraries work
IMPORTS = {  # the modules that import others, by both of their names
    *("importlib._bootstrap", "importlib._bootstrap_external"),
    *("_frozen_importlib", "_frozen_importlib_external"),
}


def end(number: int, frame: object) -> None:
    """A signal handler that ends the process. It raises no exception, because callbacks from C and
    some modules that import others ignore exceptions."""
    if os.getpid() == PROCESS:  # forked processes print nothing
        try:  # noqa: SIM105 (contextlib is not imported yet)
            os.write(stderr, f"{word(number)}\n".encode())
        except OSError:
            pass
    os._exit(128 + number)


def word(number: int) -> str:
    """The line that a script prints when a signal ends it."""
    return "interrupted" if number == signal.SIGINT else "terminated"


def handle(handler: object) -> dict[int, object]:
    """Install a handler for the signals, except for ignored ones: a shell sets background jobs to
    ignore Ctrl-C. Returns the previous handlers by signal number."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def is_script() -> bool:
    """Whether a script imports this module, and not a test that imports the script."""
    frame, names = sys._getframe(), set()
    while frame is not None:
        names.add(frame.f_globals.get("__name__"))
        frame = frame.f_back
    return names <= IMPORTS | {"__main__", "runpy", "common.script", __name__}


IS_SCRIPT = is_script()
if IS_SCRIPT:
    handle(end)
