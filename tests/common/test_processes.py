from torch import distributed

from common.processes import disconnect


def test_processes_disconnect_at_the_end():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert distributed.is_initialized()
    disconnect()
    assert not distributed.is_initialized()
    disconnect()  # as a single process does, which has no connections
