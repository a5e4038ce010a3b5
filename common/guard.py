"""From the import of this on, a signal ends a script at once, in one line.

It imports nothing that Python has not: in the time that `signal` takes, Ctrl-C would still give a
traceback.
"""

import _signal as signal
import os
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROCESS = os.getpid()
stderr = 2  # `script` has a copy for us: what a library says there is suppressed at times
IMPORTS = {  # the modules that import others, by both of their names
    *("importlib._bootstrap", "importlib._bootstrap_external"),
    *("_frozen_importlib", "_frozen_importlib_external"),
}


def end(number: int, frame: object) -> None:
    """A signal's handler while nothing is at stake. No exception: those who call back from C, and
    some who import, swallow them."""
    if os.getpid() == PROCESS:  # what it has forked is silent
        try:  # noqa: SIM105 (contextlib is not imported yet)
            os.write(stderr, f"{word(number)}\n".encode())
        except OSError:
            pass
    os._exit(128 + number)


def word(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else "terminated"


def handle(handler: object) -> dict[int, object]:
    """Give the signals this handler, but for those that are ignored, as a shell has it for what
    runs in the background; the handlers that they had."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def is_script() -> bool:
    """Whether a script is what imports this, and not a test that imports the script."""
    frame, names = sys._getframe(), set()
    while frame is not None:
        names.add(frame.f_globals.get("__name__"))
        frame = frame.f_back
    return names <= IMPORTS | {"__main__", "runpy", "common.script", __name__}


IS_SCRIPT = is_script()
if IS_SCRIPT:
    handle(end)
