"""Contenders for the tests of benchmark workers. A worker is a process that imports this module:
it imports little, so that workers start fast."""

import os
import signal

import torch

from benchmarks.timing import Contender
from common.errors import UserError


def a_contender(size: int) -> Contender:
    return Contender(lambda: torch.ones(size), items=3, tokens=size)


def no_contender() -> Contender:
    raise UserError("nosuch: no tokenizer")


def kill_this_process() -> Contender:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_when_called() -> Contender:
    def fail():
        raise ZeroDivisionError("a bug")

    return Contender(fail)
