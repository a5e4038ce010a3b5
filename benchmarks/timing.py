"""What the benchmarks share: peers timed in alternation, a table with ratios, the same as JSON."""

import argparse
import importlib.util
import json
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import UserError


def parse_benchmark_args(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a look at small shapes, under 45 s")
    parser.add_argument("--json", metavar="FILE", help="also write the rows: name, seconds, ratio")
    return parser


def installed(*modules: str) -> bool:
    """Whether the peers' modules are here; if not, say on stderr that they are left out."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"{', '.join(missing)}: not installed, left out; "
            "pip install -r requirements-benchmarks.txt",
            file=sys.stderr,
        )
    return not missing


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, patience: float = 10.0
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, all of them in turn, after one call to warm up.

    A contender whose first call takes longer than `patience` seconds is not called again.
    """
    seconds = {name: [_timed(function)] for name, function in contenders.items()}
    for name in contenders:
        if seconds[name][0] <= patience:
            seconds[name].clear()
    for _ in range(rounds):
        for name, function in contenders.items():
            if not seconds[name] or seconds[name][0] <= patience:
                seconds[name].append(_timed(function))
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median ratio of two contenders' seconds, round by round: a machine that slows down for
    a while slows both."""
    if len(seconds) != len(base):
        return statistics.median(seconds) / statistics.median(base)
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


@dataclass(frozen=True)
class Contender:
    """A call that handles so many items, and for them so many tokens."""

    call: Callable[[], object]
    items: int
    tokens: int


def rows_per_item(
    contenders: Mapping[str, Contender], base: str, rounds: int, patience: float
) -> list[dict]:
    """For `report`: seconds of an item, ratio to `base`; tokens of an item and in a second."""
    measured = alternate({n: c.call for n, c in contenders.items()}, rounds, patience)
    seconds = {
        name: [value / contenders[name].items for value in values]
        for name, values in measured.items()
    }
    rows = []
    for name, values in seconds.items():
        tokens = contenders[name].tokens / contenders[name].items
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(values),
                "ratio": ratio(values, seconds[base]),
                "measured_on": contenders[name].items,
                "tokens": tokens,
                "tokens_a_second": tokens / statistics.median(values),
            }
        )
    return rows


def peak_memory(function: Callable[..., object], *args) -> int:
    """Bytes by which a call raises the peak of resident memory of a process of its own.

    function: importable by name. It prepares and returns what is measured, a callable.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth, (function, *args))


def _peak_growth(prepare: Callable[..., Callable[[], object]], *args) -> int:
    function = prepare(*args)
    with suppress(OSError):  # Linux: the peak starts again from what is resident now
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    function()
    return peak_bytes() - before


def peak_bytes() -> int:
    """The peak of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


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
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(list(rows), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
