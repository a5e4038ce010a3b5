"""Processes that tokenise or make questions beside each other."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.pool import Pool


@contextlib.contextmanager
def process_pool(processes: int) -> Iterator[Pool]:
    """Of workers that Ctrl-C leaves to their parent, and that one thread is enough for."""
    with multiprocessing.Pool(processes, _begin) as pool:
        yield pool
        pool.close()
        pool.join()


def _begin() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends them
