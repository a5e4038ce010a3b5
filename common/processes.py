"""Several processes at one work, as torchrun starts them; a single one passes through."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from common.errors import UserError

T = TypeVar("T")


@contextlib.contextmanager
def _others_may_stop() -> Iterator[None]:
    """A connection to another process that breaks is told in a line."""
    try:
        yield
    except RuntimeError as error:
        raise UserError("another process has stopped; look for what it says") from error


def broadcast(value: T) -> T:
    """The value that the first process has."""
    with _others_may_stop():
        return broadcast_object_list([value])[0]


def is_true_on_all_ranks(value: bool) -> bool:
    """Whether it is true in every process."""
    with _others_may_stop():
        return all(gather_object([value]))


def gather_batches(batches: Iterator[T]) -> Iterator[list[T]]:
    """The next batch of every process, until none has one more."""
    while True:
        batch = next(batches, None)
        with _others_may_stop():
            step = gather_object([batch])
        if not any(step):
            return
        yield [batch for batch in step if batch]


def disconnect() -> None:
    """End the connections, once the work is done. A process that exits with its threads for them
    still there may be aborted by the C++ runtime ("terminate called")."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
