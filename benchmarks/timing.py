"""What the benchmarks share: peers timed in alternation, a table with ratios, the same as JSON."""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from common.errors import UserError
from common.json_text import json_text
from common.output_files import check_output, write_output


def parse_benchmark_args(
    description: str, data: str | None = None, quick: bool = True
) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; those on data if there is some by default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if quick:
        parser.add_argument(
            "--quick", action="store_true", help="a look at small shapes, under 45 s"
        )
    about = "also write the rows, to a new file: name, seconds, ratio"
    parser.add_argument("--json", type=new_file, metavar="FILE", help=about)
    if data is not None:
        parser.add_argument("--data", default=data, help=f"default: {data}")
        parser.add_argument(
            "--tokenizer", default="data/demo/tokenizer", help="default: the demo's"
        )
    return parser


def installed(*modules: str) -> bool:
    """Whether the peers' modules are here; if not, report on stderr that they are skipped."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{', '.join(missing)}: not installed, skipped; "
            "pip install -r requirements-benchmarks.txt",
            file=sys.stderr,
        )
    return not missing


@dataclass(frozen=True)
class Contender:
    """A call, and how many items and tokens it processes. flop and num_bytes are the least work
    that it must do: the FLOP of its matrix products, and the bytes that it must move."""

    call: Callable[[], object]
    items: int = 1
    tokens: int = 0
    flop: float = 0.0
    num_bytes: float = 0.0

    def time(self, calls: int = 1) -> float:
        """Seconds per call, of several in a row; a GPU has finished before and after them."""
        _wait_for_gpu()
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        _wait_for_gpu()
        return (time.perf_counter() - started) / calls


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def repeat(contender: Contender, rounds: int, patience: float, shortest: float) -> list[float]:
    """Seconds per call in each round of one contender, after one call that compiles and captures.
    A round takes `shortest` seconds at least; no round begins after `patience` seconds."""
    contender.time()
    calls = max(int(shortest / contender.time()), 1)
    seconds = [contender.time(calls)]
    while len(seconds) < rounds and sum(seconds) * calls < patience:
        seconds.append(contender.time(calls))
    return seconds


class Worker:
    """A contender in a process of its own, where no other's settings or memory can touch it. The
    process ends with this one, whatever it is doing."""

    def __init__(self, prepare: Callable[..., Contender], *args):
        """prepare: importable by name; makes the contender from args, in the process."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Daemons are terminated at the exit, not waited for.
        self._process = context.Process(target=_work, args=(theirs, prepare, args), daemon=True)
        resource_tracker.ensure_running()  # by the first start otherwise, which unblocks signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # is inherited for good
        try:
            self._process.start()  # workers start side by side
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    @property
    def items(self) -> int:
        """Of a call; waits until the contender is made, raises what went wrong with it."""
        return self._sizes[0]

    @property
    def tokens(self) -> int:
        return self._sizes[1]

    def time(self) -> float:
        """Seconds of one call."""
        return self._measure(Contender.time)

    def peak_growth(self) -> int:
        """Bytes by which one call raises the process's resident memory at its peak."""
        return self._measure(_peak_growth)

    @functools.cached_property
    def _sizes(self) -> tuple[int, int]:
        return self._answer()

    def _measure(self, measure: Callable[[Contender], float]) -> float:
        assert self._sizes  # the first answer
        self._pipe.send(measure)
        return self._answer()

    def _answer(self):
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError("a contender's process was killed: is the memory enough?") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(pipe: Connection, prepare: Callable[..., Contender], args: tuple) -> None:
    """A worker's process: the contender's sizes, then what it is asked to measure."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        contender = prepare(*args)
        pipe.send((contender.items, contender.tokens))
        while True:
            pipe.send(pipe.recv()(contender))
    except Exception as error:
        error.add_note(traceback.format_exc())
        with suppress(BrokenPipeError):
            pipe.send(error)


def _end_with_parent() -> None:
    """If that is killed, nothing else ends a worker and gives its memory back."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _peak_growth(contender: Contender) -> int:
    with suppress(OSError):  # Linux: the peak starts again from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    contender.call()
    return peak_bytes() - before


def peak_bytes() -> int:
    """The peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def alternate(
    workers: Mapping[str, Worker | Contender], rounds: int, patience: float = 10.0
) -> dict[str, list[float]]:
    """Seconds of each worker's call in each round, all of them in turn, after one to warm up.

    A worker whose first call takes longer than `patience` seconds is not called again: that one,
    warm or not, is then its time.
    """
    first = {name: worker.time() for name, worker in workers.items()}
    seconds = {name: [first[name]] if first[name] > patience else [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            if first[name] <= patience:
                seconds[name].append(worker.time())
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median ratio of two contenders' seconds, round by round: a machine that slows down for
    a while slows both."""
    if len(seconds) != len(base):
        return statistics.median(seconds) / statistics.median(base)
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def rows_per_item(
    workers: Mapping[str, Worker | Contender], base: str, rounds: int, patience: float
) -> list[dict]:
    """For `report`: seconds of an item, ratio to `base`; tokens of an item and in a second."""
    items = {name: worker.items for name, worker in workers.items()}  # all have started
    measured = alternate(workers, rounds, patience)
    seconds = {name: [value / items[name] for value in values] for name, values in measured.items()}
    rows = []
    for name, values in seconds.items():
        tokens = workers[name].tokens / items[name]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(values),
                "ratio": ratio(values, seconds[base]),
                "measured_on": items[name],
                "calls": len(values),
                "tokens": tokens,
                "tokens_a_second": tokens / statistics.median(values),
            }
        )
    return rows


def report(title: str, rows: Sequence[dict], path: str | None) -> None:
    """Print rows of equal keys as a table below a title; write them to a JSON file as well."""
    print(f"\n{title}  ({torch.get_num_threads()} threads, torch {torch.__version__})\n")
    header = list(rows[0])
    cells = [header, *([_shown(row[key]) for key in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *rest = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(" ".join([first, *(cell.strip().rjust(width + 2) for cell, width in
                                 zip(rest, widths[1:], strict=True))]).rstrip())  # fmt: skip
    if path is not None:
        write_output(path, json_text(list(rows), indent=2) + "\n")


def new_file(path: str) -> str:
    """An argparse type: a path where no file is that would be lost; see `check_output`."""
    check_output(path, None)
    return path


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
