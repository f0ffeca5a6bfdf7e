"""Ctrl-C while foreign code computes."""

import hashlib
import os
import signal
import threading
import time

import pytest

from cluster.console.interrupts import interruptible


def test_ctrl_c_ends_at_once_what_waits_for_foreign_code() -> None:
    begun = threading.Event()

    def compute() -> None:
        begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 8_000_000)  # some seconds in C

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible(compute)
    assert time.monotonic() - start < 0.5


def test_what_is_returned_and_raised_is_that_of_the_function() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
