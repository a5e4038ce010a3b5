"""Settings that are needed before anything is imported."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel
os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, in its interpreter
# A shell ignores SIGINT for background jobs and nohup ignores SIGHUP; tests send both to processes
# that they start, which inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def one_thread():
    """Set one thread, as in the processes that tests start and kill, for the same order of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
