"""CPU kernels whose compiled code cannot be cached."""

import pytest
from numba.core import caching

from mamba_lm.selective_scan.cpu import threads


def no_folder(self, *args):
    raise RuntimeError("cannot cache function 'kernel': no locator available for file 'x.py'")


def too_large(self, *args):
    raise OSError(27, "File too large")


def fail_otherwise(self, *args):
    raise RuntimeError("another error")


@pytest.fixture(autouse=True)
def forget_warnings():
    threads._warn_not_cached.cache_clear()


def kernel(packed):
    packed[0] = 7


@pytest.mark.parametrize(
    "where, fails, reason",
    [("__init__", no_folder, "no folder"), ("save_overload", too_large, "File too large")],
)
def test_a_kernel_that_cannot_be_cached_runs(where, fails, reason, monkeypatch, capsys):
    monkeypatch.setattr(caching.Cache, where, fails)
    assert threads._compile_cached(kernel).address
    assert threads._compile_cached(kernel).address
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and reason in err


def test_other_errors_of_numba_are_raised(monkeypatch):
    monkeypatch.setattr(caching.Cache, "__init__", fail_otherwise)
    with pytest.raises(RuntimeError, match="another error"):
        threads._compile_cached(kernel)
