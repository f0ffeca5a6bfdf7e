"""A run is asked to stop by an object in its folder."""

import os
import signal
import threading

import pytest

from cluster.storage.local import LocalStore
from cluster.storage.store import StorageError
from cluster.storage.uris import open_store
from trainers.recovery import stopping
from trainers.recovery.stopping import STOP, StopRequest, stop_on_signal


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_store_is_away_asks_once_it_is_back_and_ends_nothing_itself(
    tmp_path, monkeypatch, number
):
    class Away(LocalStore):
        def put(self, path: str, data: bytes | memoryview) -> None:
            if path == STOP and failures:
                raise StorageError(failures.pop())
            super().put(path, data)

    monkeypatch.setattr(stopping, "POLL_SECONDS", 0.05)
    failures, run = ["away", "still away"], Away(f"file://{tmp_path}")
    before = signal.getsignal(number)
    with stop_on_signal(run) as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.wait(20)
        assert wait_until(lambda: run.exists(STOP))
    assert not run.exists(STOP), "the next start would stop at once"
    assert signal.getsignal(number) is before
