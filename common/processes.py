"""Communication between the processes that torchrun starts; a single process needs none."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from common.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def _report_lost_connection() -> Iterator[None]:
    """Raise a UserError if the connection to another process breaks in this block."""
    try:
        yield
    except RuntimeError as error:
        raise UserError("another process has stopped; see its error message") from error


def broadcast(value: T) -> T:
    """Return the value that rank 0 passes, on every rank. The value must be picklable."""
    with _report_lost_connection():
        return broadcast_object_list([value])[0]


def is_true_on_all_ranks(value: bool) -> bool:
    """Return, on every rank, whether the value is true on all ranks."""
    with _report_lost_connection():
        return all(gather_object([value]))


def gather_batches(batches: Iterator[T]) -> Iterator[list[T]]:
    """Iterate over the batches of all ranks together, until no rank has one more.

    Yields, on every rank, the list of the next non-empty batch of each rank. Ranks may have
    different numbers of batches.
    """
    while True:
        batch = next(batches, None)
        with _report_lost_connection():
            step = gather_object([batch])
        if not any(step):
            return
        yield [batch for batch in step if batch]


def disconnect() -> None:
    """Close the connections at the end of the work. If their threads still run when a process
    exits, the C++ runtime may abort it ("terminate called")."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
