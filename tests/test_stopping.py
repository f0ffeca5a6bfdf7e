"""A run is asked to stop by an object in its folder."""

import threading

from cluster.storage import open_store
from trainers.stopping import STOP, StopRequest


def wait_until(condition, seconds: float = 20.0) -> bool:
    ended = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        ended.wait(0.05)
    return False


def test_an_object_named_stop_is_a_request_to_stop(tmp_path):
    run = open_store(str(tmp_path))
    with StopRequest(run) as requested:
        assert not requested()
        run.put(STOP, b"")
        assert wait_until(requested)
