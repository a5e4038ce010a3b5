"""Settings that must stand before anything is imported."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, by its interpreter
# Ignored in what a shell runs in the background, and then in all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    """As in processes that are started and killed: the same sums in the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
