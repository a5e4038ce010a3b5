"""Communication between processes: its end; tests/test_distributed_training.py tests the rest."""

from torch import distributed

from common.processes import disconnect


def test_processes_disconnect_at_the_end():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert distributed.is_initialized()
    disconnect()
    assert not distributed.is_initialized()
    disconnect()  # does nothing without connections
